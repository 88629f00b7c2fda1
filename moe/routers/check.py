"""Checks of a layer's input and routing while it runs, for finding out where a NaN or a broken router comes from.

Off by default, since they wait for the device. ``MOE_CHECK=1`` turns them on for the process; `moe doctor` runs with them.

Legend: T tokens, D model, N assignments.
"""

import os

import torch
from torch import Tensor

from moe.types import Routing, SoftRouting


def checks_enabled() -> bool:
    """Whether ``MOE_CHECK=1`` is set; never inside ``torch.compile``."""
    return os.environ.get("MOE_CHECK", "0") not in ("", "0") and not torch.compiler.is_compiling()


def check_input(x_TD: Tensor, router: str) -> None:
    """Raise a ValueError that counts the non-finite values of a router's input, and names the first token with one."""
    bad_TD = ~x_TD.isfinite()
    if bad_TD.any():
        token = int(bad_TD.any(-1).nonzero()[0])
        raise ValueError(
            f"MOE_CHECK: the input of {router} has {int(bad_TD.sum())} non-finite values, first in token {token} of "
            f"{x_TD.shape[0]}; look at what comes before this layer"
        )


def check_routing(routing: Routing | SoftRouting, num_tokens: int, router: str) -> None:
    """Raise a ValueError if a routing breaks a promise of its type."""
    if isinstance(routing, SoftRouting):
        finite = bool(routing.dispatch_GMS.isfinite().all() and routing.combine_GMS.isfinite().all())
        problems = [] if finite else ["dispatch or combine weights are not finite"]
        if routing.dispatch_GMS.shape[-1] % routing.num_experts:
            problems.append(f"{routing.dispatch_GMS.shape[-1]} slots for {routing.num_experts} experts")
    else:
        problems = _problems(routing, num_tokens)
    if problems:
        raise ValueError(f"MOE_CHECK: {router} returned a broken routing: {'; '.join(problems)}")


def _problems(routing: Routing, num_tokens: int) -> list[str]:
    problems, num_experts = [], routing.num_experts
    if routing.num_tokens != num_tokens:
        problems.append(f"it is for {routing.num_tokens} tokens, the layer has {num_tokens}")
    if not routing.weights_N.isfinite().all():
        problems.append("a weight is not finite")
    for name, ids_N, bound in (
        ("token", routing.token_ids_N, num_tokens),
        ("expert", routing.expert_ids_N, num_experts),
    ):
        if ids_N.numel() and not bool(((ids_N >= 0) & (ids_N < bound)).all()):
            problems.append(
                f"{name} ids from {int(ids_N.min())} to {int(ids_N.max())} where 0 to {bound - 1} are valid"
            )
    if problems:
        return problems  # what follows indexes with the ids
    listed = routing.expert_ids_N.numel()
    if not torch.equal(routing.counts_E, torch.bincount(routing.expert_ids_N, minlength=num_experts)):
        problems.append("its counts are not those of its list")
    if (routing.token_ids_N * num_experts + routing.expert_ids_N).unique().numel() != listed:
        problems.append("a token has an expert twice")
    if routing.top_k is not None and listed != num_tokens * routing.top_k:
        problems.append(f"{listed} assignments where top_k={routing.top_k} of {num_tokens} tokens makes another number")
    return problems
