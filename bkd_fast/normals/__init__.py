"""What normal images say of a model: their features, the thresholds, and how a run takes in images that come later."""
