"""The only place that talks to other ranks: collectives, expert exchange, the DeepSpeed engine, checkpoints."""
