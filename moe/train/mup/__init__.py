"""Does a recipe's parametrization carry over: coordinate checks and learning-rate sweeps over widths, experts and granularity."""
