"""Training: config, data, optimisation, metrics, the loop, and the report of a run."""
