"""Hash layers (Roller et al. 2021, arXiv 2106.04426): a token's experts follow from its vocabulary id alone.

Nothing is learned and nothing moves during training: the weight of each expert is 1/K, there are no parameters and no losses.
Three maps from ids to experts:

- ``mod``: the id modulo E.
- ``random``: a mix of the id's bits and a seed (the finaliser of splitmix64; Steele, Lea and Flood, OOPSLA 2014) modulo E.
- ``balanced``: a table. Ids are taken from the most frequent to the rarest and each goes to the experts that have the fewest
  tokens so far, so that the load is even on text with those frequencies.

The method has one expert per token. For more, `distinct_experts` takes the others from the rest of the id or from further
hashes, so that ids which share their first expert do not share all of them.

Legend: T tokens, V vocabulary, E experts, K experts per token.
"""

import functools
import heapq
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moe.routers.assemble import routing_of_choices
from moe.routers.base import Router, RouterConfig, check_top_k
from moe.types import NO_INFO, Routing, TokenInfo

METHODS = ("mod", "random", "balanced")
UNSET = -1  # in the table, before `set_token_counts`


@dataclass(frozen=True, kw_only=True)
class HashConfig(RouterConfig):
    """Options of `HashRouter`.

    Attributes:
        method: "mod", "random" or "balanced", see the module.
        top_k: K, experts per token.
        seed: of "random".
        vocab_size: V, rows of the table of "balanced"; `moe train` fills it in.
    """

    method: Literal["mod", "random", "balanced"] = "random"
    top_k: int = 1
    seed: int = 0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"router.method={self.method!r} is unknown; use one of {', '.join(METHODS)}")
        if self.top_k < 1:
            raise ValueError(f"router.top_k={self.top_k} must be at least 1")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"router.vocab_size={self.vocab_size} must be at least 1; use the tokenizer's size")


class HashRouter(Router):
    """Routes by vocabulary id; needs ``info.input_ids_T``.

    Attributes:
        table_VK: (V, K) int32 experts of each id, `UNSET` before `set_token_counts`; only with method "balanced".
    """

    Config = HashConfig
    config: HashConfig
    takes_balance_loss = False

    def __init__(self, dim: int, num_experts: int, config: HashConfig) -> None:
        super().__init__(dim, num_experts, config)
        check_top_k(config.top_k, num_experts)
        if config.method == "balanced":
            table_VK = torch.empty(config.vocab_size or 0, config.top_k, dtype=torch.int32)
            self.register_buffer("table_VK", table_VK)
        self._filled: tuple[int, int] | None = None  # address and version of the table when it was seen to be set
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Forget the table; there is nothing else."""
        if self.config.method == "balanced":
            nn.init.constant_(self.get_buffer("table_VK"), UNSET)

    @property
    def mean_experts_per_token(self) -> float:
        """K."""
        return self.config.top_k

    @property
    def needs_token_counts(self) -> bool:
        """Whether `set_token_counts` must be called before the first forward; a loaded table needs none."""
        if self.config.method != "balanced":
            return False
        table_VK = self.get_buffer("table_VK")
        # Looking at the table waits for the device, so it is done once per change of it.
        state = (table_VK.data_ptr(), table_VK._version)
        if self._filled != state:
            if table_VK.numel() == 0 or bool(table_VK.min() == UNSET):
                return True
            self._filled = state
        return False

    @torch.no_grad()
    def set_token_counts(self, counts_V: Tensor) -> None:
        """Make the table of "balanced" from how often each id occurs.

        Args:
            counts_V: (V,) int64, the same on all ranks.

        Raises:
            ValueError: the method is another one, or the number of ids is not ``vocab_size``.
        """
        if self.config.method != "balanced":
            raise ValueError(f"router.method={self.config.method!r} has no table; set router.method=balanced")
        if counts_V.shape != (self.config.vocab_size,):
            raise ValueError(
                f"router.vocab_size={self.config.vocab_size} and token counts of shape {tuple(counts_V.shape)} do not "
                "fit; set router.vocab_size to the size of the vocabulary and give one count per id"
            )
        counts = counts_V.detach().to("cpu", torch.int64).contiguous()
        table_VK = _packed(counts.numpy().tobytes(), self.num_experts, self.config.top_k)
        self.get_buffer("table_VK").copy_(table_VK)

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Route every token to the K experts of its id."""
        num_tokens, top_k = x_TD.shape[0], self.config.top_k
        ids_T = info.input_ids_T
        if ids_T is None or ids_T.shape != (num_tokens,):
            found = "none" if ids_T is None else f"{tuple(ids_T.shape)}"
            raise ValueError(
                f"router.name=hash needs the vocabulary ids of its {num_tokens} tokens and got {found}; call the model with "
                "input_ids, not inputs_embeds, and for a layer used alone set layer.context.input_ids_T"
            )
        experts_TK = self._experts(ids_T.long())
        weights_TK = torch.full((num_tokens, top_k), 1 / top_k, device=x_TD.device)
        return routing_of_choices(experts_TK, weights_TK, self.num_experts)

    def _experts(self, ids_T: Tensor) -> Tensor:
        num_experts, top_k = self.num_experts, self.config.top_k
        if self.config.method == "balanced":
            if self.needs_token_counts:
                raise ValueError(
                    "router.method=balanced has no table yet; call router.set_token_counts(counts_V) with how often each id "
                    "occurs in the training data (`moe train` does), with router.vocab_size set to the number of ids, "
                    "or use router.method=random"
                )
            return self.get_buffer("table_VK")[ids_T].long()
        codes_TK = (
            quotients(ids_T, num_experts, top_k)
            if self.config.method == "mod"
            else torch.stack([mix(ids_T, self.config.seed * top_k + k) for k in range(top_k)], dim=1)
        )
        return distinct_experts(codes_TK, num_experts)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit constant; products of int64 wrap around."""
    return value - 2**64 if value >= 2**63 else value


def mix(ids_T: Tensor, seed: int) -> Tensor:
    """(T,) int64 in [0, 2^63): id number ``ids_T`` of the splitmix64 sequence that starts at a point given by ``seed``."""
    bits_T = ids_T + _signed((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    # Masks make the right shifts logical: those of int64 repeat the sign.
    bits_T = (bits_T ^ ((bits_T >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    bits_T = (bits_T ^ ((bits_T >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return (bits_T ^ ((bits_T >> 31) & (2**33 - 1))) & (2**63 - 1)


def quotients(ids_T: Tensor, num_experts: int, top_k: int) -> Tensor:
    """(T, K) codes for `distinct_experts`: the id, then what is left of it after each choice."""
    codes = [ids_T]
    for k in range(top_k - 1):
        codes.append(codes[-1] // (num_experts - k))
    return torch.stack(codes, dim=1)


def distinct_experts(codes_TK: Tensor, num_experts: int) -> Tensor:
    """(T, K) int64 different experts from K codes per token.

    The first expert is the first code modulo E. The k-th of the others is the (code modulo E - k)-th of the experts not chosen
    yet, counted on cyclically from the first expert. So uniform codes give every choice the same chance, and codes that are all
    zero beyond the first, as small ids have under "mod", still load all experts alike.
    """
    first_T = codes_TK[:, 0] % num_experts
    taken: list[Tensor] = []  # distances from the first expert, in ascending order per token
    distances = [torch.zeros_like(first_T)]
    for k in range(1, codes_TK.shape[1]):
        distance_T = codes_TK[:, k] % (num_experts - k) + 1
        for smaller_T in taken:
            distance_T = distance_T + (distance_T >= smaller_T)
        distances.append(distance_T)
        taken = list(torch.stack([*taken, distance_T]).sort(dim=0).values)
    return (first_T[:, None] + torch.stack(distances, dim=1)) % num_experts


def pack_balanced(counts_V: Tensor, num_experts: int, top_k: int) -> Tensor:
    """(V, K) int32 experts of each id: frequent ids first, each to the K experts with the fewest tokens so far.

    Ids that never occur are dealt out in turn, so that they do not all meet in one expert if they come up after all.
    """
    table_VK = torch.empty(len(counts_V), top_k, dtype=torch.int32)
    loads = [(0, expert) for expert in range(num_experts)]
    counts, order = counts_V.sort(descending=True, stable=True)
    num_seen = int((counts > 0).sum())
    rows = []
    for count in counts[:num_seen].tolist():
        lightest = [heapq.heappop(loads) for _ in range(top_k)]
        rows.append([expert for _, expert in lightest])
        for load, expert in lightest:
            heapq.heappush(loads, (load + count, expert))
    if rows:
        table_VK[order[:num_seen]] = torch.tensor(rows, dtype=torch.int32)
    turns = torch.arange((len(counts_V) - num_seen) * top_k, dtype=torch.int32) % num_experts
    table_VK[order[num_seen:]] = turns.view(-1, top_k)
    return table_VK


@functools.lru_cache(maxsize=1)
def _packed(counts: bytes, num_experts: int, top_k: int) -> Tensor:
    """`pack_balanced`, done once for the layers of a model."""
    return pack_balanced(torch.frombuffer(bytearray(counts), dtype=torch.int64), num_experts, top_k)
