"""From images to an artifact: loop, step, sampler and checkpoints.

Training and inference do not import each other.
"""
