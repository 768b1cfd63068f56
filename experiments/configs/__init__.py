"""One file an experiment; each changes what it must of `experiments.config.default()`."""
