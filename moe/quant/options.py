"""What `moe quantize` is told."""

from dataclasses import dataclass

from moe.errors import nearest
from moe.quant.rounding import ROUNDERS
from moe.quant.scaling import SCALERS
from moe.quant.schemes import SCHEMES, Scheme

# Scaling that only moves range from activations to weights: of no use where activations are not rounded.
_NEEDS_ROUNDED_ACTIVATIONS = ("smoothquant",)
_EAQUANT_BALANCE = 2.0  # the best of the paper's ablation


@dataclass(frozen=True, kw_only=True)
class QuantOptions:
    """All that decides the result, apart from the source and the calibration text.

    Attributes:
        scheme: a key of `SCHEMES`.
        group_size: of the weights; ``None`` for the scheme's own, 0 for a scale per row.
        scaling: a key of `moe.quant.scaling.SCALERS`; ``None`` leaves the weights' columns as they are.
        rounding: a key of `moe.quant.rounding.ROUNDERS`.
        balance: calibrate each expert on at least this many times its fair share K N / E of the N calibration tokens
            (EAQuant, arXiv 2506.13329: 2); 0 takes the tokens that the router sends it.
        align_router: choose the router's rounding so that the distribution over the top experts stays (EAQuant).
        affinity: weight a token by its combine weight in an expert's Hessian (MoEQuant, arXiv 2505.03804).
        rotate: round rotated inputs and weights (`Grid.rotated`); for simulated schemes, since no server rotates.
        seed: of the choice of calibration text.
    """

    scheme: str
    group_size: int | None = None
    scaling: str | None = None
    rounding: str = "rtn"
    balance: float = 0.0
    align_router: bool = False
    affinity: bool = False
    rotate: bool = False
    seed: int = 0

    def resolved(self) -> Scheme:
        """The scheme with its groups.

        Raises:
            ValueError: it is unknown, has no such groups, or the methods do not go with it or with each other.
        """
        scheme = _scheme(self.scheme)
        check_methods(self.scaling, self.rounding, scheme)
        if self.affinity and self.rounding == "rtn":
            raise ValueError(
                "affinity=True weights the rows that a rounding looks at, and rtn looks at none; use clip or gptq"
            )
        if self.group_size is not None:
            scheme = scheme.with_group_size(self.group_size)
        return scheme.rotated() if self.rotate else scheme


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a ``--method`` stands for; fields as in `QuantOptions`."""

    scaling: str | None
    rounding: str
    balance: float
    align_router: bool


def parse_method(method: str, scheme: str) -> Method:
    """From ``scaling``, ``rounding`` or ``scaling+rounding``, such as ``eaquant+gptq``; without a rounding to nearest.

    ``eaquant`` is the whole of its paper: calibration is balanced and the router aligned.

    Raises:
        ValueError: a name is unknown, there are two of a kind, or they do not go with the scheme; says which do.
    """
    names = method.split("+")
    for name in names:
        if name not in SCALERS and name not in ROUNDERS:
            raise ValueError(f"--method {method!r}: {name!r} is unknown; {nearest(name, [*SCALERS, *ROUNDERS])}")
    scalings, roundings = [[name for name in names if name in family] for family in (SCALERS, ROUNDERS)]
    if len(scalings) > 1 or len(roundings) > 1:
        raise ValueError(
            f"--method {method!r} must be a scaling ({', '.join(SCALERS)}), a rounding ({', '.join(ROUNDERS)}), or one of each, as "
            "in eaquant+gptq"
        )
    scaling, rounding = next(iter(scalings), None), next(iter(roundings), "rtn")
    check_methods(scaling, rounding, _scheme(scheme))
    whole = scaling == "eaquant"
    return Method(scaling=scaling, rounding=rounding, balance=_EAQUANT_BALANCE if whole else 0.0, align_router=whole)


def check_methods(scaling: str | None, rounding: str, scheme: Scheme) -> None:
    """Raise a ValueError where a scaling or a rounding is unknown or makes no sense for a scheme."""
    if scaling is not None and scaling not in SCALERS:
        raise ValueError(f"scaling={scaling!r} is unknown; {nearest(scaling, SCALERS)}")
    if rounding not in ROUNDERS:
        raise ValueError(f"rounding={rounding!r} is unknown; {nearest(rounding, ROUNDERS)}")
    if scaling in _NEEDS_ROUNDED_ACTIVATIONS and scheme.activations is None:
        fitting = [name for name in SCALERS if name not in _NEEDS_ROUNDED_ACTIVATIONS]
        raise ValueError(
            f"--method {scaling} moves range from activations into weights, and --scheme {scheme.name} leaves activations as they "
            f"are; use {', '.join(fitting)}, {' or '.join(ROUNDERS)}"
        )


def _scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise ValueError(f"--scheme {name!r} is unknown; {nearest(name, SCHEMES)} It may be {', '.join(SCHEMES)}")
    return SCHEMES[name]
