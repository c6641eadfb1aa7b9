"""Benchmarks of the operators and of the whole model.

``harness`` checks and times, ``memory`` measures temporary memory, ``operators`` and ``model`` make the cases,
``results`` writes and prints, ``short`` is what ``bkd-fast bench`` runs. The scripts in the repository's folder
``benchmarks/`` add other libraries to the same cases.
"""
