"""A run: how it is built, its optimizer step, its numbers, and how it stops."""
