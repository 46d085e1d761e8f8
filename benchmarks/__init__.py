"""What a step costs, measured against the same mathematics written by hand."""
