"""Dense checkpoints to Mixture-of-Experts: upcycling and carving, streamed from folder to folder."""
