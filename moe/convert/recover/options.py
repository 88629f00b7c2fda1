"""Options of recovery training."""

from dataclasses import dataclass
from typing import Literal

DEFAULT_LR = {"lora": 2e-4, "full": 2e-5}


@dataclass(frozen=True, kw_only=True)
class RecoverOptions:
    """How to train.

    Attributes:
        steps: optimizer steps.
        mode: "lora" trains low-rank updates of attention and FFNs, merged at the end; "full" trains all weights.
        lr: peak learning rate; by default that of `DEFAULT_LR`.
        warmup: share of the steps in which the learning rate rises; then it falls by a half cosine to a tenth.
        batch_size: windows per step.
        micro_batch_size: windows per forward; by default all of a step.
        clip: largest gradient norm, of the routers and of everything else.
        weight_decay: of matrices; routers have none.
        router_lr: how far a step may move a token's logits, as a share of their spread over experts (see `routers`); 0 freezes
            the routers.
        balance_rate: step of the selection bias per optimizer step, as a share of the spread of a token's scores; 0 leaves it.
        distill: factor on the distance to the teacher, where there is one.
        lora_rank, lora_alpha: r and alpha; updates are multiplied by alpha / r.
        bf16: compute under bf16 autocast; weights and optimizer states are fp32.
        eval_every: steps between evaluations; 0 evaluates at the start and at the end.
        seed: of the order of the windows, the LoRA weights and the noise of routers that have some.
    """

    steps: int = 200
    mode: Literal["lora", "full"] = "lora"
    lr: float | None = None
    warmup: float = 0.05
    batch_size: int = 4
    micro_batch_size: int | None = None
    clip: float = 1.0
    weight_decay: float = 0.0
    router_lr: float = 0.0
    balance_rate: float = 0.0
    distill: float = 1.0
    lora_rank: int = 8
    lora_alpha: int = 32
    bf16: bool = False
    eval_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in DEFAULT_LR:
            raise ValueError(f"recover.mode={self.mode!r} is unknown; use one of {', '.join(DEFAULT_LR)}")
        for name in ("steps", "batch_size", "windows_per_forward", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"recover.{_OPTION.get(name, name)}={getattr(self, name)} must be at least 1")
        for name in ("peak_lr", "clip", "lora_alpha"):
            if getattr(self, name) <= 0:
                raise ValueError(f"recover.{_OPTION.get(name, name)}={getattr(self, name)} must be positive")
        for name in ("weight_decay", "router_lr", "balance_rate", "distill", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"recover.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"recover.warmup={self.warmup} must lie in [0, 1)")
        if self.batch_size % self.windows_per_forward:
            raise ValueError(
                f"recover.batch_size={self.batch_size} is not divisible by recover.micro_batch_size={self.micro_batch_size}"
            )

    @property
    def peak_lr(self) -> float:
        """Highest learning rate."""
        return DEFAULT_LR[self.mode] if self.lr is None else self.lr

    @property
    def windows_per_forward(self) -> int:
        """Windows of a micro-batch."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size


_OPTION = {"peak_lr": "lr", "windows_per_forward": "micro_batch_size"}
