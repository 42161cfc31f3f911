"""Training runs (cells) by the hundred, each run once, on the next free worker of a launcher."""
