"""Which decoder layers a conversion takes, as the command line says it."""

import re

_PART = re.compile(r"(\d+)(?:(-)(\d*)(?::(\d+))?)?")


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Layers from 0, in order: ``all``, or parts with commas: ``3``, ``8-11``, ``12-`` (to the top), ``0-:2`` (every second).

    Raises:
        ValueError: not of this form, or a layer that the model does not have.
    """
    if text == "all":
        return tuple(range(num_layers))
    chosen: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"--layers {text!r}: {part!r} is none of 3, 8-11, 12- or 0-:2; or use --layers all")
        first, dash, last, step = match.groups(default="")
        if step and int(step) == 0:
            raise ValueError(f"--layers {text!r}: the step of {part!r} must be at least 1")
        end = int(first) if not dash else int(last or num_layers - 1)
        layers = range(int(first), end + 1, int(step or 1))
        if not layers or layers[-1] >= num_layers:
            raise ValueError(f"--layers {text!r}: {part!r} is not within layers 0 to {num_layers - 1} of this model")
        chosen.update(layers)
    return tuple(sorted(chosen))
