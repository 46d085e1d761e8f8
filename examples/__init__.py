"""Worked examples on top of `bilevel`: a folder for the flagship, a file for each small one."""
