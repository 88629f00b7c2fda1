"""Scaling: what a run will need and take on machines that are not here."""
