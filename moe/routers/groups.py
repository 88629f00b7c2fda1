"""Which tokens form a group, for routers that mix or compare tokens.

"batch"     all tokens of the call: one group.
"sequence"  the tokens of one sequence.
"position"  the tokens at the same position of ``group_size`` different sequences (arXiv 2310.15961, 2402.07871). No group holds
            two tokens of one sequence, so this is the only kind that a causal model may use. Results depend on which
            sequences are batched together. A position is a column of the batch: left padding shifts sequences against
            each other, which changes who is grouped and leaks nothing.

With a cache, generation has one token per sequence and call: a position group is then (a part of) the batch of prompts, or
of a beam search's candidates.

Legend: T tokens, B sequences, L their length (T = B * L, row by row), G groups, M rows of a group, X anything.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.types import TokenInfo

GroupKind = Literal["batch", "sequence", "position"]


@dataclass(frozen=True, kw_only=True)
class TokenGroups:
    """Tokens in groups of equal size; every token has exactly one row.

    Attributes:
        num_groups: G.
        num_rows: M.
        token_ids_GM: (G, M) int64, the token of each row; ``None`` where groups are the tokens in order (T = G * M).
        rows_T: (T,) int64, the row of each token in the flattened groups; ``None`` where in order.
        real_GM: (G, M) bool, False at padding tokens and at rows that fill up a short last group (which name token 0);
            ``None`` where every row is a real token.
    """

    num_groups: int
    num_rows: int
    token_ids_GM: Tensor | None = None
    rows_T: Tensor | None = None
    real_GM: Tensor | None = None

    def gather(self, values_TX: Tensor) -> Tensor:
        """(T, X) by token to (G, M, X) by row."""
        if self.token_ids_GM is None:
            return values_TX.view(self.num_groups, self.num_rows, values_TX.shape[-1])
        return values_TX[self.token_ids_GM]

    def scatter(self, values_GMX: Tensor) -> Tensor:
        """(G, M, X) by row back to (T, X) by token."""
        values_RX = values_GMX.reshape(self.num_groups * self.num_rows, values_GMX.shape[-1])
        return values_RX if self.rows_T is None else values_RX[self.rows_T]


def group_tokens(
    num_tokens: int, info: TokenInfo, kind: GroupKind, group_size: int, device: torch.device | None = None
) -> TokenGroups:
    """Groups of one call's tokens.

    Args:
        num_tokens: T.
        info: says how many sequences the tokens are, and which of them are padding.
        kind: see above.
        group_size: sequences in a position group; of the last ones, or where there are fewer sequences, it holds what is
            left. The other kinds do not read it.
        device: of the tensors.
    """
    num_sequences = info.num_sequences
    assert num_tokens % num_sequences == 0, f"{num_tokens} tokens are not {num_sequences} sequences of equal length"
    length = num_tokens // num_sequences
    token_ids_GM = rows_T = None
    real_GM = None if info.keep_T is None else info.keep_T
    if kind == "position":
        num_rows = min(group_size, num_sequences)
        per_position = -(-num_sequences // num_rows)
        num_groups, width = length * per_position, per_position * num_rows
        if width != num_sequences or (length > 1 and num_sequences > 1):
            positions_L1 = torch.arange(length, device=device)[:, None]
            sequences_W = torch.arange(width, device=device)
            ids_LW = sequences_W * length + positions_L1
            if width != num_sequences:
                ids_LW = ids_LW.masked_fill(sequences_W >= num_sequences, 0)
            token_ids_GM = ids_LW.reshape(num_groups, num_rows)
            rows_T = (sequences_W[:num_sequences, None] + width * positions_L1.T).reshape(-1)
            if real_GM is not None:
                real_GM = real_GM[token_ids_GM]
            if width != num_sequences:
                exists_GM = (sequences_W < num_sequences).expand(length, width).reshape(num_groups, num_rows)
                real_GM = exists_GM if real_GM is None else real_GM & exists_GM
    elif kind == "sequence":
        num_groups, num_rows = num_sequences, length
    else:
        num_groups, num_rows = 1, num_tokens
    return TokenGroups(
        num_groups=num_groups,
        num_rows=num_rows,
        token_ids_GM=token_ids_GM,
        rows_T=rows_T,
        real_GM=None if real_GM is None else real_GM.view(num_groups, num_rows),
    )


def softmax_over_rows(logits_GMX: Tensor, real_GM: Tensor | None) -> Tensor:
    """Softmax over the real rows of each group; the others get 0, and so does a group without real rows."""
    if real_GM is None:
        return logits_GMX.softmax(1)
    absent_GM1 = ~real_GM[..., None]
    # The least finite value instead of -inf, with which a group of padding alone is NaN on the way.
    weights_GMX = logits_GMX.masked_fill(absent_GM1, torch.finfo(logits_GMX.dtype).min).softmax(1)
    return weights_GMX.masked_fill(absent_GM1, 0.0)


def check_group(kind: str, group_size: int, kinds: tuple[str, ...] = ("batch", "sequence", "position")) -> None:
    """Raise a ValueError for a bad ``router.group`` or ``router.group_size``."""
    if kind not in kinds:
        raise ValueError(f"router.group={kind!r} is unknown; use one of {', '.join(map(repr, kinds))}")
    if group_size < 1:
        raise ValueError(f"router.group_size={group_size} must be at least 1")


def describe_leak(router: str, kind: GroupKind) -> str:
    """What is wrong with a group that holds several tokens of one sequence in a causal model, and the first fix."""
    return (
        f"router {router!r} with router.group={kind!r} looks at later tokens of the same sequence, so a causal model would "
        "see what it has to predict; set router.group=position"
    )


def warn_of_extra_work(router: str, experts_per_token: float, asked: float, num_rows: int, fix: str) -> None:
    """Warn when a batch makes so small groups that each token costs more than half as much again as configured."""
    if experts_per_token > 1.5 * asked:
        warnings.warn(
            f"router {router!r} evaluates {experts_per_token:.3g} experts per token where its options ask for "
            f"{asked:.3g}, since its groups have {num_rows} tokens only; {fix}",
            stacklevel=2,
        )
