"""Compile every Triton kernel in every configuration and compare its resources with a budget."""
