"""F and G at any point, leaving no trace, and verified against plain autograd."""
