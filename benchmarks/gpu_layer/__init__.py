"""``gpu-layer``: the expert FFN on one GPU against other implementations, on the tables that the field publishes."""
