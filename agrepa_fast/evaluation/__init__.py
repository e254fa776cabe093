"""Evaluation of samples: rows of wavs from a checkpoint, metrics of each clip and of sets of clips, intervals."""
