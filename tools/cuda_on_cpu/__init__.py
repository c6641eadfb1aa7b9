"""Compile the CUDA kernels as C++: for their tests, under sanitizers, with planted faults, and to count traffic."""
