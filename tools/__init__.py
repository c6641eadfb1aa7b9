"""Checks and reports that are not tests, started from the repository's root: ``python -m tools.NAME``."""
