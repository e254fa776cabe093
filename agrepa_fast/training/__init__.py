"""The training loop: DeepSpeed engine, checkpoints, EMA, metrics, samples."""
