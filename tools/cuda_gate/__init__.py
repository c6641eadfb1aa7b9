"""Compile every CUDA kernel for every architecture and compare its resources with a budget."""
