"""Carving: the FFN of a dense decoder cut into shared and routed experts. One method per file; `CARVERS` names them."""
