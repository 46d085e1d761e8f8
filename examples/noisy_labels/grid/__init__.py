"""A table of methods x data sets x noise x seeds, each cell a run of its own."""
