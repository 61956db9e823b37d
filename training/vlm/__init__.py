"""The recipe of the strong model: a real vision tower and a real language model, joined and trained."""
