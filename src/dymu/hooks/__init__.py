"""What is hung into a stock transformers model, and all that knows transformers' insides."""
