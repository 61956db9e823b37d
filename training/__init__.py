"""The recipe behind ``models/demo``: real images in, a small stock LLaVA out."""
