"""Meta label correction: learn a classifier and corrected labels from noisy labels and a few trusted ones."""
