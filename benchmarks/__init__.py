"""Measurements. Each script writes a result file that says where it ran; the tables of README and docs are made from
those. `candidates` holds code that is measured and not used by the library yet."""
