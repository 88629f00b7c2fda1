"""Post-training quantisation of MoE models for serving: what may be rounded, how, and what servers load."""
