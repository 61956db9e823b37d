"""Shared by evaluation and benchmarks: time, costs, provenance, progress bars, tables, charts, result files."""
