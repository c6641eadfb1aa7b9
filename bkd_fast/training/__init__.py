"""From images to an artifact: loop, step, sampler, feature cache, checkpoints and thresholds.

Training and inference do not import each other.
"""
