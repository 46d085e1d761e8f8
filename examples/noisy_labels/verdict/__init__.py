"""Ways to correct labels, judged on trusted samples."""
