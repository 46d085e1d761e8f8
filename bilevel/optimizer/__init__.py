"""What stands around a method: checks, torch optimizers, state, and taking steps back."""
