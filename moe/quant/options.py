"""What `moe quantize` is told."""

from dataclasses import dataclass

from moe.quant.schemes import SCHEMES, Scheme


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
        seed: of the choice of calibration text.
    """

    scheme: str
    group_size: int | None = None
    scaling: str | None = None
    rounding: str = "rtn"
    balance: float = 0.0
    align_router: bool = False
    affinity: bool = False
    seed: int = 0

    def resolved(self) -> Scheme:
        """The scheme with its groups.

        Raises:
            ValueError: it is unknown, or has no such groups.
        """
        if self.scheme not in SCHEMES:
            raise ValueError(f"--scheme {self.scheme!r} is unknown; use one of {', '.join(SCHEMES)}")
        scheme = SCHEMES[self.scheme]
        return scheme if self.group_size is None else scheme.with_group_size(self.group_size)
