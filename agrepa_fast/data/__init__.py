"""Recordings to features, tokens and WebDataset shards; imports nothing by itself."""
