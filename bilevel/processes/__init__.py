"""Several processes as one: a loss is the mean over them, and whatever one decides all decide."""
