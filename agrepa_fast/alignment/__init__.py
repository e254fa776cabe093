"""Teacher alignment of selected layers: heads, loss, schedule."""
