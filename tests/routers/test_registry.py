"""What holds for every router, whatever its options and input; and how configs name them."""

import pytest
import torch
from helpers.routing import check_routing, make_router
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.routers import ROUTERS, parse_router
from moe.types import Routing

# Option sets by router; a router without one here runs with its defaults.
OPTIONS: dict[str, list[dict]] = {
    "topk": [
        {},
        {"renormalize": False},
        {"top_k": 1, "renormalize": False},
        {"softmax_order": "after", "top_k": 3},
        {"score": "sigmoid", "jitter": 0.1},
        {"num_groups": 4, "top_k_groups": 2, "top_k": 4},
        {"selection_bias": True},
    ],
    "noaux_tc": [{}, {"num_groups": 2, "top_k_groups": 1, "top_k": 4, "route_scale": 2.5}],
    "noisy_topk": [{}, {"top_k": 1, "softmax_order": "before", "renormalize": False}],
}
VARIANTS = [(name, options) for name in ROUTERS for options in OPTIONS.get(name, [{}])]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 9),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    training=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_every_router_keeps_the_promises_of_routing(
    name: str, options: dict, num_tokens: int, scale: float, dtype: torch.dtype, training: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    router = make_router(8, 8, logits=True, name=name, **options).train(training)
    x_TD = (scale * torch.randn(num_tokens, 8)).to(dtype).requires_grad_()  # logits of up to some 1e4; or all equal
    routing = router(x_TD)
    assert isinstance(routing, Routing)
    check_routing(routing, num_tokens, 8)
    if routing.top_k is not None:
        assert routing.top_k == router.mean_experts_per_token
    assert (routing.weights_N >= 0).all()
    total = routing.weights_N.sum() + sum(loss.coef * loss.value for loss in routing.aux_losses.values())
    total.backward()
    assert x_TD.grad is not None
    assert x_TD.grad.isfinite().all()
    for parameter in router.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_evaluation_is_deterministic(name: str, options: dict) -> None:
    router = make_router(8, 8, name=name, **options).eval()
    x_TD = torch.randn(20, 8)
    first, second = router(x_TD), router(x_TD)
    assert torch.equal(first.expert_ids_N, second.expert_ids_N)
    assert torch.equal(first.weights_N, second.weights_N)
    assert not first.aux_losses or router.training


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_decisions_are_taken_in_fp32(name: str, options: dict) -> None:
    """Selective precision (arXiv 2101.03961): bf16 input routes as the same values in fp32 do, also under autocast."""
    router = make_router(32, 8, name=name, **options).eval()
    x_TD = torch.randn(200, 32).bfloat16()
    expected = router(x_TD.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = router(x_TD)
    for routing in (router(x_TD), autocast):
        assert torch.equal(routing.expert_ids_N, expected.expert_ids_N)
        assert torch.equal(routing.weights_N, expected.weights_N)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_weights_survive_a_checkpoint(name: str, options: dict) -> None:
    router, other = (make_router(8, 8, name=name, **options).eval() for _ in range(2))
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data.normal_()
    other.load_state_dict(router.state_dict())
    x_TD = torch.randn(20, 8)
    assert torch.equal(router(x_TD).expert_ids_N, other(x_TD).expert_ids_N)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "noisy_topk"])
def test_reset_draws_from_the_global_generator(name: str) -> None:
    router = make_router(64, 8, name=name)
    torch.manual_seed(5)
    router.reset_parameters(0.3)
    first = router.get_parameter("weight").clone()
    router.reset_parameters(0.3)
    assert not torch.equal(first, router.get_parameter("weight"))
    torch.manual_seed(5)
    router.reset_parameters(0.3)
    assert torch.equal(first, router.get_parameter("weight"))


def test_unknown_router_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"router.name='top_k' is unknown; did you mean 'topk'\?"):
        parse_router({"name": "top_k"})


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"router.renormalise is not an option of router 'topk'; did you mean 'reno"):
        parse_router({"renormalise": True})
    with pytest.raises(ValueError, match=r"router.zzz is not an option of router 'switch'; known: .*jitter.*top_k"):
        parse_router({"name": "switch", "zzz": 1})


def test_parsing_leaves_its_input_alone() -> None:
    options = {"name": "topk", "top_k": 3}
    router_class, config = parse_router(options)
    assert options == {"name": "topk", "top_k": 3}
    assert router_class is ROUTERS["topk"]
    assert config.top_k == 3


def test_every_router_has_a_test_file(request: pytest.FixtureRequest) -> None:
    for name in ROUTERS:
        assert (request.path.parent / f"test_{name}.py").is_file(), name
