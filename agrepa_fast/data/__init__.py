"""Shards to batches: the index, reading, and which clips a step takes; imports nothing by itself."""
