"""What only a GPU can show: no waiting for the device, CUDA graphs, offsets past 2**31, and memory full of NaN, step after step."""

import pytest
import torch
from torch import Tensor

from moe.kernels import ops, reference
from moe.routers.assemble import routing_of_choices
from moe.types import DEFAULT_FFN, FFNOptions, TopKRule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NUM_EXPERTS, TOP_K, DIM, HIDDEN = 16, 4, 256, 128


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_KERNELS", "triton")


def leaves(num_tokens: int, dim: int = DIM, hidden: int = HIDDEN, num_experts: int = NUM_EXPERTS) -> list[Tensor]:
    """x, router logits, and both weights, with gradients."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device="cuda", generator=generator)).bfloat16().requires_grad_()

    return [
        normal(num_tokens, dim),
        normal(num_tokens, num_experts),
        normal(num_experts, 2 * hidden, dim, scale=dim**-0.5),
        normal(num_experts, dim, hidden, scale=hidden**-0.5),
    ]


def layer(tensors: list[Tensor], options: FFNOptions = DEFAULT_FFN, top_k: int = TOP_K) -> Tensor:
    """Router epilogue and experts."""
    x_TD, logits_TE, w_up_EHD, w_down_EDF = tensors
    choices = ops.route_topk(logits_TE, TopKRule(top_k=top_k))
    routing = routing_of_choices(
        choices.expert_ids_TK, choices.weights_TK, w_up_EHD.shape[0], counts_E=choices.counts_E, stats=choices.stats
    )
    return ops.expert_ffn(x_TD, routing, w_up_EHD, w_down_EDF, "swiglu", options)


def step(tensors: list[Tensor], dy_TD: Tensor, options: FFNOptions = DEFAULT_FFN) -> list[Tensor]:
    """Output and gradients."""
    y_TD = layer(tensors, options)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, tensors, dy_TD)]


def test_nothing_waits_for_the_device() -> None:
    tensors, dy_TD = leaves(512), torch.randn(512, DIM, device="cuda").bfloat16()
    step(tensors, dy_TD)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(tensors, dy_TD)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [FFNOptions(), FFNOptions(recompute=True)], ids=["kept", "recomputed"])
def test_a_graph_of_a_step_takes_other_tokens(options: FFNOptions) -> None:
    tensors, dy_TD = leaves(300), torch.randn(300, DIM, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(tensors, dy_TD, options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors, dy_TD, options)
    for seed in (1, 2):
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            for tensor in tensors[:2]:  # other tokens, and other choices: the second time nearly all go to one expert
                tensor.copy_(torch.randn(tensor.shape, device="cuda", generator=generator))
            tensors[1][:, 3] += 50.0 * (seed - 1)
        graph.replay()
        found = [tensor.clone() for tensor in captured]
        for got, expected in zip(found, step(tensors, dy_TD, options), strict=True):
            assert torch.equal(got, expected)


def test_memory_full_of_nan_in_every_step() -> None:
    tensors, dy_TD = leaves(700), torch.randn(700, DIM, device="cuda").bfloat16()
    with torch.no_grad():
        tensors[1][:, 5:] -= 100.0  # eleven experts get nothing
    first = None
    for _ in range(3):
        poison = [torch.full((2**22,), float("nan"), device="cuda") for _ in range(16)]
        poison += [
            torch.full((2**16,), float("nan"), device="cuda") for _ in range(64)
        ]  # small tensors have a pool of their own
        del poison  # the allocator hands this memory out next
        found = step(tensors, dy_TD)
        assert all(tensor.isfinite().all() for tensor in found)
        first = first or found
        for got, expected in zip(found, first, strict=True):
            assert torch.equal(got, expected), "repeats are the same bit for bit"


def test_offsets_past_two_to_the_31() -> None:
    """Twice 2**31 elements in the pre-activation; the last tokens' rows, and gradients over all of them, in pieces."""
    num_tokens, dim, hidden, num_experts, top_k = 2**18, 128, 1024, 8, 8
    needed = num_tokens * top_k * (2 * 2 * hidden + 3 * 2 * hidden + 2 * dim)
    if torch.cuda.mem_get_info()[0] < 1.3 * needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    assert num_tokens * top_k * 2 * hidden >= 2**32
    x_TD, logits_TE, w_up_EHD, w_down_EDF = tensors = leaves(num_tokens, dim, hidden, num_experts)
    dy_TD = torch.randn(num_tokens, dim, device="cuda").bfloat16()
    y_TD = layer(tensors, top_k=top_k)
    gradients = torch.autograd.grad(y_TD, tensors, dy_TD)
    pieces = 16
    size = num_tokens // pieces
    sums = [torch.zeros(weight.shape, device="cuda") for weight in (w_up_EHD, w_down_EDF)]
    for piece in range(pieces):
        own = slice(piece * size, (piece + 1) * size)
        part = [x_TD[own].detach().requires_grad_(), logits_TE[own].detach().requires_grad_(), w_up_EHD, w_down_EDF]
        part_y_TD = layer(part, top_k=top_k)
        found = torch.autograd.grad(part_y_TD, part, dy_TD[own])
        assert torch.equal(y_TD[own], part_y_TD)
        for whole, got in zip(gradients[:2], found[:2], strict=True):
            assert torch.equal(whole[own], got)
        for total, got in zip(sums, found[2:], strict=True):
            total += got.float()
    for whole, total in zip(gradients[2:], sums, strict=True):
        assert ((whole.float() - total).norm() / total.norm()) < 2e-2
    last = slice(num_tokens - 64, num_tokens)
    weights_TK = logits_TE[last].float().softmax(-1)
    ids_TK = torch.arange(num_experts, device="cuda").expand(64, num_experts)
    truth = reference.expert_ffn(
        x_TD[last].double(),
        routing_of_choices(ids_TK, weights_TK, num_experts),
        w_up_EHD.double(),
        w_down_EDF.double(),
        "swiglu",
    )
    assert ((y_TD[last].double() - truth).norm() / truth.norm()) < 2e-2
