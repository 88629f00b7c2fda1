"""What the expert FFN's launches share, whatever their weights: grids, tiles, the sum by token, and the order of a forward.

Legend: T tokens, D model, F expert FFN, H = 2F (SwiGLU) or F (GELU), N assignments.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from moe.kernels.triton_gemm import combine_kernel
from moe.kernels.triton_plan import Plan, Tiles, make_tiles
from moe.kernels.triton_tuning import Blocks

Grid = tuple[int]


def precision(dtype: torch.dtype) -> str:
    """Of fp32 products: as torch's own matmul does them."""
    # Not `allow_tf32`: reading that raises where a program has set `fp32_precision`, its successor.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def make_grid(num_units: int, blocks: Blocks, tensor: Tensor) -> Grid:
    """A program per unit of work, or as many as a persistent grid has."""
    if blocks.per_sm and tensor.is_cuda:
        processors = torch.cuda.get_device_properties(tensor.device).multi_processor_count
        num_units = min(num_units, blocks.per_sm * processors)
    return (max(num_units, 1),)


class Launcher:
    """What the launches of one call share: x, the plan, and the tiles made so far by number of rows."""

    def __init__(self, x_TD: Tensor, plan: Plan, num_experts: int, activation: str) -> None:
        self.x_TD, self.plan, self.num_experts = x_TD, plan, num_experts
        self.gated, self.num_rows = activation == "swiglu", plan.order_N.numel()
        self._tiles: dict[int, Tiles] = {}

    def walk(self, blocks: Blocks, columns: int) -> tuple[Grid, Tiles]:
        """The grid over all row tiles and ``columns``, and the row tiles."""
        if blocks.m not in self._tiles:
            self._tiles[blocks.m] = make_tiles(self.plan, blocks.m)
        tiles = self._tiles[blocks.m]
        return make_grid(tiles.experts_M.numel() * triton.cdiv(columns, blocks.n), blocks, self.x_TD), tiles


def combine(
    rows_ND: Tensor, weights_N: Tensor | None, bags_N: Tensor, bag_offsets: Tensor, num_tokens: int, top_k: int
) -> Tensor:
    """Sum of each token's rows, (T, D)."""
    dim = rows_ND.shape[1]
    out_TD = rows_ND.new_empty(num_tokens, dim)
    block = min(triton.next_power_of_2(dim), 2048)
    if num_tokens:
        combine_kernel[(num_tokens, triton.cdiv(dim, block))](
            rows_ND, weights_N, bags_N, bag_offsets, out_TD, dim,
            TOP_K=top_k, WEIGHTED=weights_N is not None, BLOCK_D=block, num_warps=4 if block <= 1024 else 8,
        )  # fmt: skip
    return out_TD


def _bags(token_ids_N: Tensor, position_N: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Sorted positions grouped by token, and where each token's begin (T + 1), for routings of varying K."""
    bags_N = position_N[token_ids_N.argsort(stable=True)]
    sizes_T = token_ids_N.new_zeros(num_tokens).scatter_add_(0, token_ids_N, torch.ones_like(token_ids_N))
    ends_T = sizes_T.cumsum(0).to(torch.int32)
    return bags_N, torch.cat([ends_T.new_zeros(1), ends_T])


def run_forward(
    plan: Plan,
    token_ids_N: Tensor,
    weights_N: Tensor,
    num_tokens: int,
    top_k: int,
    up: Callable[[], tuple[Tensor, Tensor]],
    down: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """y (T, D), then what backward needs: h, order, position, tokens, offsets, bags, bag offsets, sorted weights.

    Args:
        plan: of the assignments.
        token_ids_N, weights_N: (N,) as the routing lists them.
        num_tokens: T.
        top_k: K, or 0 where it varies from token to token; bags are empty where it does not.
        up: launches the up-projection; returns h (N, H), or an empty tensor, and the activation (N, F).
        down: launches the down-projection, (N, F) -> (N, D).
    """
    sorted_weights_N = weights_N[plan.order_N]
    bags_N, bag_offsets = plan.position_N.new_empty(0), plan.position_N.new_empty(0)
    if not top_k:
        bags_N, bag_offsets = _bags(token_ids_N, plan.position_N, num_tokens)
    h_NH, a_NF = up()
    y_ND = down(a_NF)
    used_N = plan.position_N if top_k else bags_N
    y_TD = combine(y_ND, sorted_weights_N, used_N, bag_offsets, num_tokens, top_k)
    indices = [plan.order_N, plan.position_N, plan.token_ids_N, plan.offsets_E1]
    return [y_TD, h_NH, *indices, bags_N, bag_offsets, sorted_weights_N]
