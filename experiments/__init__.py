"""Experiments: the only place where choices meet. Run them as `python -m experiments.NAME`."""
