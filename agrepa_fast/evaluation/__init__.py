"""What samples sound like, in numbers: rows of wavs from a checkpoint, metrics of each clip and of sets, intervals."""
