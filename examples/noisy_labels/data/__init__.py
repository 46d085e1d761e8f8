"""What is trained on: images and tables, their labels, and batches of them."""
