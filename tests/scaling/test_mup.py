"""muP's factors: each rule, the Adam symmetry they rest on, what a checkpoint keeps, and errors that name the width."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config

from moe.models import MoEConfig, MoEForCausalLM
from moe.routers import ROUTERS, parse_router
from moe.scaling.mup import ROLES, Factors, check_base, scale_initial, width_factors
from moe.train.config import OptimConfig
from moe.train.optim import param_groups
from moe.types import Routing, TokenInfo

BASE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
MOE = {"num_experts": 4, "num_shared_experts": 1, "shared_gate": True, "granularity": 2}


def decoder(width: int = 128, kind: type = LlamaConfig, **values: Any) -> Any:
    fields = {
        "hidden_size": width,
        "intermediate_size": width * 3 // 2,
        "num_hidden_layers": 1,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 32,
        "head_dim": 16,
        "vocab_size": 64,
        "tie_word_embeddings": False,
    }
    return kind(**(fields | values))


def make(width: int = 128, base: dict[str, int] | None = BASE, **values: Any) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(MoEConfig(text_config=decoder(width, **values), moe=MOE, mup=base))


def test_factors_of_every_tensor() -> None:
    """r = 4 everywhere: matrices between widths by root and rate, what maps width to a number by 1 / r, the rest not at all."""
    found = width_factors(make())
    hidden, output = Factors(init=0.5, lr=0.25, weight_decay=4.0), Factors(init=0.25, lr=0.25, weight_decay=4.0)
    layer = "model.layers.0."
    expected = {
        "model.embed_tokens.weight": Factors(),
        **{f"{layer}self_attn.{name}_proj.weight": hidden for name in "qkvo"},
        f"{layer}mlp.router.weight": output,
        f"{layer}mlp.experts.gate_up_proj": hidden,
        f"{layer}mlp.experts.down_proj": hidden,
        f"{layer}mlp.shared_experts.gate_up_proj.weight": hidden,
        f"{layer}mlp.shared_experts.down_proj.weight": hidden,
        f"{layer}mlp.shared_experts.gate.weight": output,
        f"{layer}input_layernorm.weight": Factors(),
        f"{layer}post_attention_layernorm.weight": Factors(),
        "model.norm.weight": Factors(),
        "lm_head.weight": output,
    }
    assert found == expected


def test_each_matrix_goes_by_its_own_fan_in() -> None:
    """The base's FFN is half as wide, its model a quarter."""
    found = width_factors(make(base=BASE | {"intermediate_size": 96}))
    assert found["model.layers.0.mlp.experts.gate_up_proj"].lr == 0.25
    assert found["model.layers.0.mlp.experts.down_proj"] == Factors(init=0.5**0.5, lr=0.5, weight_decay=2.0)


def test_wider_heads_shrink_the_queries() -> None:
    """Scores over 16 times wider heads are divided by 16 and not by 4: the missing 4 is in the queries, or in their norm."""
    values = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 256}
    base = BASE | {"head_dim": 16}
    found = width_factors(make(base=base, **values))
    assert found["model.layers.0.self_attn.q_proj.weight"] == Factors(init=0.125, lr=0.0625, weight_decay=16.0)
    assert found["model.layers.0.self_attn.k_proj.weight"].init == 0.5
    normed = width_factors(make(base=base, kind=Qwen3Config, **values))
    assert normed["model.layers.0.self_attn.q_proj.weight"].init == 0.5
    assert normed["model.layers.0.self_attn.q_norm.weight"] == Factors(init=0.25, lr=0.25, weight_decay=4.0)


def test_the_base_itself_and_standard_models_have_no_factors() -> None:
    assert set(width_factors(make(32)).values()) == {Factors()}
    assert set(width_factors(make(base=None)).values()) == {Factors()}
    assert set(width_factors(nn.Linear(3, 4)).values()) == {Factors()}


def test_initial_deviations() -> None:
    found, plain = make(), make(base=None)
    factors = width_factors(found)
    for (name, scaled), (_, standard) in zip(found.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(scaled, standard * factors[name].init)


def _adam_losses(model: nn.Module, groups: list[dict[str, Any]], steps: int = 5) -> list[float]:
    named = dict(model.named_parameters())
    groups = [
        {**group, "params": [named[name] for name in group["params"]], "lr": 1e-2 * group["lr_scale"]}
        for group in groups
        if group["params"]
    ]
    optimizer = torch.optim.AdamW(groups)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("tied", [True, False])
def test_a_factor_in_the_forward_pass_is_a_factor_on_values_and_rate(tied: bool) -> None:
    """The textbook's form, logits times 1 / r with a readout of the base's deviation and rate, trains the same way."""
    ours = make(tie_word_embeddings=tied).double()
    optim = OptimConfig(eps=1e-20, weight_decay=0.1)
    textbook = make(tie_word_embeddings=tied).double()
    name = "model.norm.weight" if tied else "lm_head.weight"
    groups = param_groups(textbook, optim)
    for group in groups:
        group["params"] = [each for each in group["params"] if each != name]
    decay = 0.0 if tied else 0.1
    groups.append({"params": [name], "lr_scale": 1.0, "eps": 1e-20, "weight_decay": decay})
    with torch.no_grad():
        textbook.get_parameter(name).mul_(4)
    textbook.lm_head.register_forward_hook(lambda module, arguments, output: output / 4)
    got, expected = _adam_losses(ours, param_groups(ours, optim)), _adam_losses(textbook, groups)
    assert got == pytest.approx(expected, rel=1e-9)
    assert expected[-1] < expected[0]


def test_groups_carry_rate_decay_and_eps() -> None:
    groups = {group["name"]: group for group in param_groups(make(), OptimConfig(weight_decay=0.1, eps=1e-8))}
    assert set(groups) == {"decay", "no_decay", "decay lr x 0.25"}
    slow = groups["decay lr x 0.25"]
    assert (slow["lr_scale"], slow["weight_decay"], slow["eps"]) == (0.25, pytest.approx(0.4), pytest.approx(2.5e-9))
    assert groups["decay"]["params"] == ["model.embed_tokens.weight"]
    assert len({group["name"] for group in groups.values()}) == len(groups)


def test_a_checkpoint_keeps_the_base(tmp_path: Any) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.mup == BASE
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True)), "scaled twice"
    assert width_factors(loaded) == width_factors(model)


def test_a_dense_decoder_too() -> None:
    config = decoder()
    config.mup = BASE
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    scale_initial(model)
    torch.testing.assert_close(model.model.layers[0].mlp.down_proj.weight, before / 2)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"hidden_size": 32}, r"base lacks intermediate_size, num_attention_heads:.*intermediate_size=192, num_att"),
        (BASE | {"hiden_size": 3}, r"base.hiden_size is not a width; did you mean 'hidden_size'"),
        (BASE | {"hidden_size": 0}, r"base.hidden_size=0 must be a positive whole number"),
        (BASE | {"hidden_size": 3.5}, r"base.hidden_size=3.5 must be a positive whole number"),
        (BASE | {"expert_hidden": 8}, r"base.expert_hidden is set and moe.expert_hidden is not"),
    ],
)
def test_wrong_bases(base: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_base(base, MoEConfig(text_config=decoder(), moe=MOE))


def test_granularity_of_the_base() -> None:
    """Experts 4 times narrower, 4 times as many at work: their outputs' sum keeps its first size, and its change."""
    base = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8}
    made = {"num_experts": 16, "granularity": 4, "num_shared_experts": 1, "router": {"name": "topk", "top_k": 8}}
    with torch.device("meta"):
        model = MoEForCausalLM(MoEConfig(text_config=decoder(), moe=made, mup=base | {"granularity": 1}))
    found = width_factors(model)
    layer = "model.layers.0.mlp"
    assert found[f"{layer}.experts.down_proj"] == Factors(init=4.0, lr=4.0, weight_decay=0.25)
    assert found[f"{layer}.shared_experts.down_proj.weight"] == Factors(init=2.0, lr=4.0, weight_decay=0.25)
    del found[f"{layer}.experts.down_proj"], found[f"{layer}.shared_experts.down_proj.weight"]
    assert set(found.values()) == {Factors()}
    model.config.mup = base
    assert set(width_factors(model).values()) == {Factors()}, "without it, the base's granularity is the model's"


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (None, r"base.granularity is set and there are no experts; remove it"),
        (
            MOE | {"expert_hidden": 8},
            r"base.granularity is set and moe.expert_hidden sets the experts' width; remove it",
        ),
    ],
)
def test_a_granularity_that_says_nothing(moe: dict[str, Any] | None, message: str) -> None:
    config = decoder() if moe is None else MoEConfig(text_config=decoder(), moe=moe)
    base = BASE | {"granularity": 2} | ({} if moe is None else {"expert_hidden": 8})
    with pytest.raises(ValueError, match=message):
        check_base(base, config)


def test_experts_of_their_own_width_need_a_base() -> None:
    config = MoEConfig(text_config=decoder(), moe=MOE | {"expert_hidden": 20})
    with pytest.raises(ValueError, match=r"base lacks expert_hidden.*expert_hidden=20"):
        check_base(BASE, config)
    config.mup = BASE | {"expert_hidden": 10}
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    assert width_factors(model)["model.layers.0.mlp.experts.down_proj"].lr == 0.5


def _router_case(name: str, dim: int, options: dict[str, Any], seed: int) -> tuple[nn.Module, Tensor]:
    """A router of muP deviations whose base has 64 dimensions, and tokens that lie in a few directions."""
    torch.manual_seed(seed)
    router_class, config = parse_router({"name": name, **options})
    router = router_class(dim, 4, config).train()
    generator = torch.Generator().manual_seed(dim)
    mixing_TS = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    x_TD = mixing_TS @ torch.randn(3, dim, generator=generator)
    x_TD = x_TD / x_TD.square().mean(-1, keepdim=True).sqrt()
    with torch.no_grad():
        for key, role in router.width_roles().items():
            r = dim / 64
            parameter = router.get_parameter(key)
            parameter.mul_(ROLES[role.role](r).init * (r**role.init_exponent if parameter.dim() > 1 else 1.0))
    return router, x_TD


def _logit_change(name: str, dim: int, options: dict[str, Any], seed: int) -> float:
    """Root mean square of what one Adam step on the logits themselves adds to them."""
    router, x_TD = _router_case(name, dim, options, seed)
    roles = router.width_roles()
    groups = [
        {"params": [parameter], "lr": 1e-3 * ROLES[roles[key].role](dim / 64).lr, "eps": 0.0}
        for key, parameter in router.named_parameters()
    ]
    optimizer = torch.optim.Adam(groups)
    info = TokenInfo(num_sequences=2, input_ids_T=torch.arange(24) % 7)

    def logits() -> Tensor:
        torch.manual_seed(2)
        routing = router(x_TD, info)
        if routing.logits_TE is not None:
            return routing.logits_TE
        dense_TE = torch.zeros(routing.num_tokens, routing.num_experts)  # DSelect-k has only weights
        return dense_TE.index_put((routing.token_ids_N, routing.expert_ids_N), routing.weights_N)

    before = logits()
    target = torch.randn(before.shape, generator=torch.Generator().manual_seed(5))
    (before * target).sum().backward()
    optimizer.step()
    return (logits() - before).detach().square().mean().sqrt().item()


WITH_WEIGHTS = sorted(
    name
    for name, router in ROUTERS.items()
    if any(parameter.dim() > 1 for parameter in router(8, 4, router.Config()).parameters())
)
VARIANTS = [(name, {}) for name in WITH_WEIGHTS] + [
    ("soft", {"normalize": False}),
    ("sinkhorn", {"init": "orthogonal"}),
    ("modified_softmax", {"transform": "normalize"}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_learning_moves_every_routers_logits_alike_at_any_width(name: str, options: dict[str, Any]) -> None:
    sizes = [
        sum(_logit_change(name, dim, options, seed) for seed in range(16)) for dim in (256, 1024, 4096)
    ]  # of CMoE's neurons the other factor is random
    assert max(sizes) / min(sizes) < 1.2, sizes


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_roles_cover_all_parameters(name: str, options: dict[str, Any]) -> None:
    router_class, config = parse_router({"name": name, **options})
    router = router_class(8, 4, config)
    assert router.width_roles().keys() == dict(router.named_parameters()).keys()
    assert {role.role for role in router.width_roles().values()} <= ROLES.keys()
    assert isinstance(router(torch.randn(6, 8), TokenInfo(input_ids_T=torch.arange(6))), Routing) or name in (
        "soft",
        "mixture_of_tokens",
    )
