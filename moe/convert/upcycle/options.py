"""What an upcycling is told."""

from dataclasses import dataclass, fields
from typing import Literal

CHOICES = {
    "indices": ("shared", "independent"),
    "score": ("softmax", "sigmoid"),
    "dtype": ("keep", "fp32", "bf16"),
}


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions:
    """Options of all methods; one that a method does not use must stay at its default.

    Attributes:
        num_experts: E, routed experts per layer.
        top_k: K, of them per token.
        method: a key of `UPCYCLERS`.
        ratio: r, share of an expert's neurons that are changed (drop, noise).
        indices: "shared" changes the same neurons in all matrices of an expert, "independent" others in each (drop, noise).
        noise_std: deviation of the noise (noise).
        granularity: G, how many shards the FFN is cut into (virtual-group).
        num_shared: S, shards that every token passes (virtual-group).
        layers: which layers become MoEs; see `parse_layers`.
        score: "softmax" over experts, or "sigmoid" with a selection bias per expert, at first 0 (as DeepSeek-V3 and GLM-4.5).
        renormalize: divide the K weights of a token by their sum. Otherwise they are the scores, times what makes their sum 1
            where the gate says nothing: not exact, but the only way to train a gate with K = 1.
        router_std: deviation of the gate's normal weights; 0 makes every token choose the same experts.
        seed: of everything random.
        dtype: of the result: "keep" (as the source), "fp32" or "bf16".
    """

    num_experts: int
    top_k: int = 2
    method: str = "copy"
    ratio: float = 0.5
    indices: Literal["shared", "independent"] = "shared"
    noise_std: float = 0.02
    granularity: int = 1
    num_shared: int = 0
    layers: str = "all"
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    router_std: float = 0.02
    seed: int = 0
    dtype: Literal["keep", "fp32", "bf16"] = "keep"

    def __post_init__(self) -> None:
        if self.num_experts < 2:
            raise ValueError(f"--experts {self.num_experts} must be at least 2")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"--top-k {self.top_k} must lie between 1 and --experts {self.num_experts}")
        if self.top_k == 1 and self.renormalize:
            raise ValueError(
                "--top-k 1 with renormalised weights makes every weight 1 and gives the gate no gradient; "
                "use --top-k 2, or add --no-renormalize"
            )
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"--ratio {self.ratio} must lie in [0, 1]")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)!r} is unknown; use one of {', '.join(known)}")
        for flag, value in (("--noise-std", self.noise_std), ("--router-std", self.router_std)):
            if value < 0:
                raise ValueError(f"{flag} {value} must not be negative")
        if self.granularity < 1:
            raise ValueError(f"--granularity {self.granularity} must be at least 1")
        if self.num_shared < 0:
            raise ValueError(f"--shared {self.num_shared} must not be negative")

    def flags(self, uses: frozenset[str]) -> dict[str, str]:
        """Command-line flags with their values: of the common options, and of the method's own that are in ``uses``."""
        found = {}
        for field in fields(self):
            if field.name in SPECIFIC and field.name not in uses:
                continue
            value = getattr(self, field.name)
            if isinstance(value, bool):
                if value != field.default:
                    found[f"--no-{field.name}"] = ""
            else:
                found[flag(field.name)] = str(value)
        return found

    def check_used(self, uses: frozenset[str]) -> None:
        """Check that the options of other methods are at their defaults.

        Raises:
            ValueError: one is not.
        """
        for field in fields(self):
            if field.name in SPECIFIC - uses and (value := getattr(self, field.name)) != field.default:
                reason = NOT_USED.get(field.name, "does nothing here")
                raise ValueError(f"{flag(field.name)} {value} with --method {self.method}: {reason}; leave it out")


# Options that some methods alone have.
SPECIFIC = frozenset({"ratio", "indices", "noise_std", "granularity", "num_shared"})
NOT_USED = {
    "num_shared": "a shared copy beside routed copies would add the FFN twice; --method virtual-group cuts the FFN into shards "
    "of which some can be shared",
    "granularity": "experts have the width of the dense FFN; --method virtual-group cuts it into shards",
}
_FLAGS = {"num_experts": "--experts", "num_shared": "--shared"}


def flag(name: str) -> str:
    """The command-line flag of an option."""
    return _FLAGS.get(name, "--" + name.replace("_", "-"))
