"""``check_directions``: what a method computed, against plain autograd and finite differences."""
