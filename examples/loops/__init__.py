"""`bilevel` inside the training loops that people have: one program a file, on the problem of ``problem.py``."""
