"""What to run when an accelerator is at hand for minutes: `python -m experiments.accelerator`."""
