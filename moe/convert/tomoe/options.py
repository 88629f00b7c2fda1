"""Options of ToMoE."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ToMoEOptions:
    """How masks are trained. Defaults are those of the released run (arXiv 2501.15316), but for the number of steps.

    Attributes:
        num_experts: E.
        active_share: p, the share of an FFN's neurons that a token passes.
        steps: optimizer steps; the paper takes 20,000.
        batch_size: windows per step.
        lr: of AdamW, constant.
        weight_decay: of AdamW.
        kd_coef: factor on the distillation loss.
        param_coef: lambda, factor on the size regulariser.
        union_coef: alpha, factor on the union regulariser.
        balance_coef: beta, factor on the router's balance loss.
        temperature: of both relaxations.
        offset: added to the masks' logits, so that nearly all neurons are on at the start.
        width_multiple: the experts' width is rounded up to a multiple of this; quantised formats want 32 or more.
        bf16: compute the language model under bf16 autocast, from weights as they are stored; else all of it is fp32.
        seed: of the initial weights, the noise and the order of the windows.
    """

    num_experts: int = 8
    active_share: float = 0.5
    steps: int = 2000
    batch_size: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.05
    kd_coef: float = 2.0
    param_coef: float = 16.0
    union_coef: float = 3.0
    balance_coef: float = 1.0
    temperature: float = 0.4
    offset: float = 3.0
    width_multiple: int = 32
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_experts", 2), ("steps", 1), ("batch_size", 1), ("width_multiple", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"tomoe.{name}={getattr(self, name)} must be at least {least}")
        if not 0 < self.active_share < 1:
            raise ValueError(f"tomoe.active_share={self.active_share} must lie between 0 and 1, such as 0.5")
        for name in ("lr", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"tomoe.{name}={getattr(self, name)} must be positive")
        for name in ("weight_decay", "kd_coef", "param_coef", "union_coef", "balance_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"tomoe.{name}={getattr(self, name)} must not be negative")
