"""What a run leaves behind for people: numbers, tables and pictures."""
