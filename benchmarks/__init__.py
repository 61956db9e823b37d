"""Measurements. Each script writes a result file that says where it ran; the README's tables are made from those."""
