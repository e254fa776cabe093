"""Teacher alignment of selected layers: heads and loss."""
