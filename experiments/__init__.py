"""Entry points: each is run as `python -m experiments.NAME` from the root of the repository."""
