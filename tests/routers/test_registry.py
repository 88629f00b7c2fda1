"""What holds for every router, whatever its options and input; and how configs name them.

A router without an option set in `OPTIONS` runs with its defaults. What some routers do differently on purpose is listed with
the reason, and each list is checked to be no longer than it must be.

Legend: T tokens (B sequences of length L), E experts, D model.
"""

import pytest
import torch
from helpers.routing import check_routing, make_router
from helpers.soft import check_soft_routing
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.layer import MoELayer, MoESpec
from moe.routers import ROUTERS, Router, parse_router
from moe.types import Routing, SoftRouting, TokenInfo

E, VOCAB = 8, 1000

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
    "hash": [{}, {"method": "mod", "top_k": 3}, {"method": "balanced", "vocab_size": 1000, "top_k": 2}],
    "kmeans": [{"update_every": 1, "num_samples": 8}],
    "round_robin": [{}, {"top_k": 3, "offset": 5}],
    "gshard": [{}, {"second_policy": "all"}],
    "sparsemixer": [{}, {"output_scale": False, "jitter_eps": 1.0}],
    "sparsemixer_v2": [{}, {"top_k": 1, "jitter_eps": 0.01}, {"corrected": True, "top_k": 3}, {"top_k": 8}],
    "stochastic": [
        {},
        {"straight_through": "sigmoid", "target_k": 0.5},
        {"backward": "all", "evaluation": "threshold"},
    ],
    "dselect_k": [{}, {"top_k": 1, "entropy_coef": 0.0}, {"top_k": 3, "gamma": 0.1}, {"gate": "static"}],
    "gumbel": [
        {},
        {"eval_samples": 0, "temperature_start": 2.0, "temperature_end": 0.1, "temperature_steps": 9},
        {"mode": "hard"},
        {"mode": "hard_all", "temperature_start": 0.1, "temperature_end": 0.1},
    ],
    "dense_to_sparse": [{}, {"hard_after": 0}, {"hard_after": None, "activation": "gelu", "threshold": 0.2}],
    "modified_softmax": [
        {},
        {"transform": "sigmoid", "jitter": 0.1},
        {"transform": "normalize", "top_k": 1, "renormalize": False},
    ],
    "relu": [{}, {"top_k": 1, "l1_coef": 0.5}],
    "soft": [{}, {"group": "position", "group_size": 3, "capacity_factor": 2.0}],
    "mixture_of_tokens": [{"sparse_after": 0}, {"sparse_after": 0, "sparse_top_k": 3, "learn_temperature": True}],
    "expert_choice": [{"group": "batch"}, {"capacity": 8.0}, {"group": "sequence", "capacity": 0.5}],
    "cmoe": [{}, {"top_k": 1}, {"num_groups": 2, "top_k_groups": 1, "top_k": 3}],
    "sinkhorn": [{}, {"top_k": 2, "max_iterations": 3}, {"assignment": "optimal"}, {"group": "position"}],
}
VARIANTS = [(name, options) for name in ROUTERS for options in OPTIONS.get(name, [{}])]

# Routers that may leave a token without an expert, so that the residual alone carries it.
MAY_SKIP_A_TOKEN = {
    "relu": "a token may have no positive logit (arXiv 2412.14711)",
    "stochastic": "every gate may be shut (arXiv 1308.3432)",
    "expert_choice": "experts take tokens, and may all take others (arXiv 2202.09368)",
}
# Routers that start the same whatever the random state.
STARTS_WITHOUT_CHANCE = {
    "noisy_topk": "zeros, so that the noise alone decides at first (arXiv 1701.06538)",
    "hash": "nothing to initialise",
    "round_robin": "nothing to initialise",
}


def router_of(name: str, options: dict, dim: int = E, std: float | None = None) -> Router:
    """Ready to route; with ``std``, matrices are normal of that deviation, so that nothing starts at zero."""
    router = make_router(dim, E, name=name, **options)
    if getattr(router, "needs_token_counts", False):
        router.set_token_counts(torch.randint(100, (VOCAB,)))
    if std is not None:
        with torch.no_grad():
            for parameter in router.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=std)
    return router


def info_of(num_tokens: int, num_sequences: int = 1, keep_T: Tensor | None = None) -> TokenInfo:
    ids_T = torch.randint(VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))
    return TokenInfo(num_sequences=num_sequences, keep_T=keep_T, input_ids_T=ids_T)


def with_identity(router: Router) -> Router:
    """Where the gate is an E x E matrix, the input is then the logits."""
    weight = getattr(router, "weight", None)
    if weight is not None and weight.shape == (E, E):
        weight.data.copy_(torch.eye(E))
    return router


def assert_same_routing(got: Routing | SoftRouting, expected: Routing | SoftRouting) -> None:
    assert type(got) is type(expected)
    fields = (
        ("token_ids_N", "expert_ids_N", "weights_N") if isinstance(got, Routing) else ("dispatch_GMS", "combine_GMS")
    )
    for field in fields:
        assert torch.equal(getattr(got, field), getattr(expected, field)), field


def state_of(router: Router) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in router.state_dict().items()}


def variants(*without: str) -> pytest.MarkDecorator:
    wanted = [(name, options) for name, options in VARIANTS if name not in without]
    return pytest.mark.parametrize(("name", "options"), wanted, ids=str)


@variants()
@settings(max_examples=12, deadline=None, derandomize=True)
@example(shape=(1, 1), scale=1e4, exact=True, dtype=torch.float32, training=True, padding=False, seed=0)
@example(shape=(3, 3), scale=0.0, exact=False, dtype=torch.float32, training=True, padding=False, seed=1)
@example(shape=(3, 3), scale=1e4, exact=True, dtype=torch.bfloat16, training=True, padding=True, seed=2)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 3)),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    exact=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    training=st.booleans(),
    padding=st.booleans(),
    seed=st.integers(0, 2**20),
)
@pytest.mark.filterwarnings("ignore:router .* evaluates")  # groups are tiny here
def test_every_router_keeps_the_promises_of_its_routing(
    name: str,
    options: dict,
    shape: tuple[int, int],
    scale: float,
    exact: bool,
    dtype: torch.dtype,
    training: bool,
    padding: bool,
    seed: int,
) -> None:
    """Logits that are all equal, tiny, or beyond +-1e4; one token, none, padding: all finite, forward and backward."""
    torch.manual_seed(seed)
    num_tokens = shape[0] * shape[1]
    router = with_identity(router_of(name, options)).train(training)
    x_TD = torch.randn(num_tokens, E)
    x_TD = scale * (x_TD.sign() if exact else x_TD)
    x_TD = x_TD.to(dtype).requires_grad_()
    keep_T = torch.rand(num_tokens) < 0.7 if padding else None
    routing = router(x_TD, info_of(num_tokens, shape[0], keep_T))
    if isinstance(routing, Routing):
        check_routing(routing, num_tokens, E)
        assert routing.top_k is None or routing.top_k == router.mean_experts_per_token
        assert (routing.weights_N >= 0).all()
        total = routing.weights_N.sum()
        if name not in MAY_SKIP_A_TOKEN:
            kept = set(range(num_tokens)) if keep_T is None else set(keep_T.nonzero()[:, 0].tolist())
            assert kept <= set(routing.token_ids_N.tolist()), "a token was lost"
    else:
        if scale <= 1:  # beyond, weights that underflow to zero look like padding
            check_soft_routing(routing, [True] * num_tokens if keep_T is None else keep_T.tolist(), E)
        assert routing.dispatch_GMS.isfinite().all()
        assert routing.combine_GMS.isfinite().all()
        assert routing.combine_GMS.shape == routing.dispatch_GMS.shape
        total = routing.dispatch_GMS.square().sum() + routing.combine_GMS.square().sum()
    total = total + sum(loss.coef * loss.value for loss in routing.aux_losses.values())
    assert torch.isfinite(total)
    gradients = list(router.parameters())
    if total.requires_grad:
        (total + 0 * x_TD.float().sum()).backward()
        assert x_TD.grad is not None
        gradients.append(x_TD)
    for tensor in gradients:
        assert tensor.grad is None or tensor.grad.isfinite().all()


@pytest.mark.parametrize("name", MAY_SKIP_A_TOKEN)
def test_routers_that_may_skip_a_token_do(name: str) -> None:
    """Else they should not be listed."""
    skipped = 0
    for options in OPTIONS[name]:
        for training in (True, False):
            router = with_identity(router_of(name, options)).train(training)
            skipped += 3000 - len(router(torch.randn(3000, E), info_of(3000)).token_ids_N.unique())
    assert skipped > 0


@variants()
@pytest.mark.filterwarnings("ignore:router .* evaluates")
def test_evaluation_is_deterministic(name: str, options: dict) -> None:
    router = router_of(name, options, std=1.0).eval()
    x_TD, info = torch.randn(20, E), info_of(20, 4)
    first, second = router(x_TD, info), router(x_TD, info)
    assert_same_routing(first, second)
    assert not first.aux_losses


@variants()
@pytest.mark.filterwarnings("ignore:router .* evaluates")
def test_the_same_random_state_gives_the_same_routing(name: str, options: dict) -> None:
    """What activation checkpointing relies on: a forward that runs twice routes twice alike."""
    router = router_of(name, options, std=1.0)
    x_TD, info = torch.randn(20, E), info_of(20, 4)
    torch.manual_seed(3)
    first = router(x_TD, info)
    before = state_of(router)
    torch.manual_seed(3)
    assert_same_routing(router(x_TD, info), first)
    for key, value in state_of(router).items():
        assert torch.equal(value, before[key]), f"forward changed {key}"


@variants()
def test_decisions_are_taken_in_fp32(name: str, options: dict) -> None:
    """Selective precision (arXiv 2101.03961): bf16 input routes as the same values in fp32 do, also under autocast."""
    router = router_of(name, options, dim=32, std=0.2).eval()
    x_TD, info = torch.randn(200, 32).bfloat16(), info_of(200, 8)
    expected = router(x_TD.float(), info)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = router(x_TD, info)
    for routing in (router(x_TD, info), autocast):
        assert_same_routing(routing, expected)


def scramble(router: Router) -> None:
    """Another state than any initial one."""
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data.normal_() if tensor.is_floating_point() else tensor.data.random_(1, E)


@variants()
def test_state_survives_a_checkpoint(name: str, options: dict) -> None:
    router, other = (router_of(name, options).eval() for _ in range(2))
    scramble(router)
    other.load_state_dict(router.state_dict())
    x_TD, info = torch.randn(20, E), info_of(20, 4)
    assert_same_routing(router(x_TD, info), other(x_TD, info))


@variants()
def test_reset_forgets_everything_and_draws_from_the_global_generator(name: str, options: dict) -> None:
    states = []
    for seed in (5, 5, 6):
        router = router_of(name, options)
        scramble(router)
        torch.manual_seed(seed)
        router.reset_parameters(0.3)
        states.append(state_of(router))
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), f"{key} is left from before, or drawn elsewhere"
    drawn = any(not torch.equal(value, states[2][key]) for key, value in states[0].items())
    assert drawn != (name in STARTS_WITHOUT_CHANCE)


@variants()
def test_fp32_buffers_stay_fp32_and_share_no_name_with_a_parameter(name: str, options: dict) -> None:
    """Loading a model keeps tensors of these names in fp32, so a parameter of that name would stay with them."""
    router = router_of(name, options)
    layer = MoELayer(E, MoESpec(num_experts=E, expert_hidden=4, num_shared_experts=1, shared_gate=True))
    router.to(torch.bfloat16)
    for buffer in router.fp32_buffers:
        if buffer in dict(router.named_buffers()):
            assert router.get_buffer(buffer).dtype == torch.float32
        for parameter, _ in (*router.named_parameters(), *layer.named_parameters()):
            assert buffer not in parameter.split(".")
    assert {p.dtype for p in router.parameters()} <= {torch.bfloat16}


@variants()
def test_no_parameter_is_a_scalar(name: str, options: dict) -> None:
    """DeepSpeed broadcasts parameters as bytes, which a tensor of shape () cannot be viewed as; (1,) can."""
    for parameter, value in router_of(name, options).named_parameters():
        assert value.dim() > 0, parameter


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
