"""Servers: transformers' own with DyMU applied, and vLLM's with a plug-in."""
