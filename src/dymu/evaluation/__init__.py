"""Accuracy against image tokens and time, for every method that reduces them."""
