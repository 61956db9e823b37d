"""What a model's encoder keeps of many pictures: their counts, drawings of what merged, and a page about them.

The language model is never asked.
"""
