"""How long a model takes and how much memory, with DyMU and without, on prompts of several budgets and batches."""
