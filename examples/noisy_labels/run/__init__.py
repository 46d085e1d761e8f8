"""One run: its options, its training, and what is kept of it."""
