"""Worked examples; each folder is a program of its own on top of `bilevel`."""
