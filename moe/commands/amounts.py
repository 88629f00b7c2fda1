"""Large numbers on the command line."""

import re

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def parse_amount(option: str, text: str) -> float:
    """A positive number such as 1e20, 350M or 1.3B (billions).

    Raises:
        ValueError: it is none; names the option.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([KMBT]?)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{option} {text!r} is no positive number, such as 1e20, 350M or 1.3B")
    return float(match[1]) * _UNITS[match[2].upper()]
