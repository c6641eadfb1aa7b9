"""From an artifact to predictions: the detector, its stages, tiles and streams, and what makes it fast.

Training and inference do not import each other.
"""
