"""What the CUDA C++ and the Triton kernels have in common: how tensors are handed to them, and sums of many blocks."""
