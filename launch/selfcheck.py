"""One rank of `moe doctor`'s live check: python -m moe.launch.selfcheck DEVICE OUT.json

Each rank runs the whole layer on all tokens, and the expert-parallel layer on its own; outputs and all gradients must agree.
"""

import json
import os
import sys
from pathlib import Path

import torch

from moe.layer import MoELayer, MoESpec
from moe.parallel.collectives import all_reduce_sum
from moe.parallel.exchange.expert_parallel import ExpertParallelExchange
from moe.parallel.ranks import init_ranks, leave
from moe.routers.balance import BalanceConfig


def main(arguments: list[str]) -> int:
    """Run the check and let rank 0 write the relative errors by name."""
    device_type, out = arguments
    ranks = init_ranks(device_type, timeout_seconds=120)
    torch.manual_seed(0)
    spec = MoESpec(
        num_experts=8,
        expert_hidden=32,
        num_shared_experts=1,
        router={"name": "topk", "top_k": 3},
        balance=BalanceConfig(aux_coef=0.0),  # a mean over each rank's tokens, and the ranks have unequal numbers here
    )
    whole = MoELayer(64, spec).to(ranks.device)
    torch.manual_seed(0)
    sharded = MoELayer(64, spec).to(ranks.device)
    num_local = spec.num_experts // ranks.world_size
    mine = slice(ranks.rank * num_local, (ranks.rank + 1) * num_local)
    for name, parameter in list(sharded.experts.named_parameters()):
        setattr(sharded.experts, name, torch.nn.Parameter(parameter.detach()[mine].clone()))
    sharded.exchange = ExpertParallelExchange(None, ranks.rank, ranks.world_size)
    sharded.reduce_counts = all_reduce_sum
    x_TD, dy_TD = torch.randn(2, 50, 64, device=ranks.device)
    x_TD = x_TD.requires_grad_()
    own = slice(0, 17) if ranks.rank == 0 else slice(17, 50)  # uneven on purpose
    own_x_TD = x_TD.detach()[own].clone().requires_grad_()

    y_TD = whole(x_TD)
    y_TD.backward(dy_TD)
    own_y_TD = sharded(own_x_TD)
    own_y_TD.backward(dy_TD[own])

    assert x_TD.grad is not None and own_x_TD.grad is not None
    errors = {"output": _error(own_y_TD, y_TD[own]), "x": _error(own_x_TD.grad, x_TD.grad[own])}
    expected = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        whole_grad = expected[name].grad
        assert parameter.grad is not None and whole_grad is not None
        if name.startswith("experts."):
            errors[name] = _error(parameter.grad, whole_grad[mine])
        else:
            errors[name] = _error(all_reduce_sum(parameter.grad), whole_grad)
    worst = {name: max(found[name] for found in ranks.gather(errors)) for name in errors}
    if ranks.is_main:
        Path(out).write_text(json.dumps(worst), encoding="utf-8")
    ranks.barrier()
    leave()
    return 0


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((got - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    assert "RANK" in os.environ, "started by `moe doctor`"
    sys.exit(main(sys.argv[1:]))
