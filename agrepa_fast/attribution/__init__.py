"""Which layers cause the velocity: gates, FoG-A, selection, and what is written about them."""
