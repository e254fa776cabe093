"""Pages in one file: they open from a disk without a network, and ask for nothing outside of themselves."""
