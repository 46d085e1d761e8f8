"""The parts of ``own_data.py``: label correction on a user's own table or images."""
