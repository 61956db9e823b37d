"""What `dymu.apply` hooks into a stock transformers model, and all code that knows transformers' insides."""
