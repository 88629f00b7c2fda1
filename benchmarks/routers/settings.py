"""One table: the options with which every router runs in each part, so that all do the same work per token.

The text model has 8 experts of width F and a budget of two of them per token, which is the dense model's FFN of width 2F.
Routers that take one expert per token get 4 experts of width 2F: the same active and the same total parameters. Routers that
evaluate more than the budget keep the 8 experts, and the column ``ffn_flops`` says how much more they compute.

The other parts use routers alone, as gates: one of 8 experts per example for the clusters, as in that paper, and two of 8 per
task for the multi-task problem. The Switch loss is a layer's and acts in the text model only; losses of a router's own act
everywhere. Two routers have such losses besides what they do otherwise, so the multi-task problem has them without, too.
What is not set here is the router's default.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]
NUM_EXPERTS, TOP_K = 8, 2
TEXT_BATCH = 16  # sequences, hence the tokens at one position; groups of routers that compare tokens are no larger

ALL_RUN = "every expert runs on every token"
WIDE: dict[str, Any] = {"num_experts": NUM_EXPERTS // TOP_K, "width": TOP_K}


@dataclass(frozen=True, kw_only=True)
class TextSetting:
    """A router in the text model.

    Attributes:
        name: in the registry of routers.
        options: of the router, given the number of optimizer steps (schedules span a part of the run).
        label: in tables, where a router occurs more than once; else its name.
        num_experts: E.
        width: of an expert, in units of F.
        balance: balance settings of the layer that differ from the default (the Switch loss times 0.01).
        note: what the numbers do not say.
    """

    name: str
    options: Callable[[int], Options] = lambda steps: {}
    label: str = ""
    num_experts: int = NUM_EXPERTS
    width: int = 1
    balance: Options = field(default_factory=dict)
    note: str = ""

    @property
    def key(self) -> str:
        return self.label or self.name


def _top_k(name: str, **more: Any) -> TextSetting:
    return TextSetting(name=name, options=lambda steps: {"top_k": TOP_K}, **more)


_GROUPED: Options = {"group": "position", "group_size": TEXT_BATCH}
_ACROSS = f"compares the tokens at one position of {TEXT_BATCH} sequences"

TEXT: tuple[TextSetting, ...] = (
    _top_k("topk"),
    TextSetting(name="switch", **WIDE),
    _top_k("noisy_topk"),
    TextSetting(
        name="noaux_tc",
        options=lambda steps: {"top_k": TOP_K},
        balance={"aux_coef": 0.0, "bias_update_rate": 1e-3},
        note="bias instead of a balance loss",
    ),
    TextSetting(name="gshard", note="drops second experts in training"),
    _top_k("modified_softmax"),
    TextSetting(name="sparsemixer", **WIDE),
    _top_k("sparsemixer_v2"),
    _top_k("dselect_k", note="up to 8 experts until the codes saturate"),
    _top_k("relu", note="half of the experts until the controller has settled"),
    TextSetting(
        name="stochastic", options=lambda steps: {"target_k": float(TOP_K)}, note="evaluation runs every expert"
    ),
    TextSetting(name="gumbel", label="gumbel soft", note=ALL_RUN),
    TextSetting(name="gumbel", label="gumbel hard", options=lambda steps: {"mode": "hard"}, **WIDE),
    TextSetting(
        name="dense_to_sparse",
        options=lambda steps: {"temperature_steps": steps // 2, "hard_after": steps // 2},
        note="every expert in the first half of the run",
        **WIDE,
    ),
    TextSetting(
        name="expert_choice",
        options=lambda steps: {"capacity": float(TOP_K), **_GROUPED},
        note=_ACROSS,
    ),
    TextSetting(
        name="sinkhorn", options=lambda steps: {"top_k": TOP_K, **_GROUPED}, note=f"{_ACROSS}, in training only"
    ),
    TextSetting(
        name="soft",
        options=lambda steps: {"capacity_factor": float(TOP_K), **_GROUPED},
        note=_ACROSS.replace("compares", "mixes"),
    ),
    TextSetting(
        name="mixture_of_tokens",
        options=lambda steps: {"group_size": NUM_EXPERTS // TOP_K},
        note=f"mixes the tokens at one position of {NUM_EXPERTS // TOP_K} sequences",
    ),
    TextSetting(name="hash", note="by vocabulary id, nothing learned", **WIDE),
    TextSetting(name="kmeans", options=lambda steps: {"update_every": max(steps // 10, 1)}, **WIDE),
    _top_k("round_robin", note="by place in the batch, nothing learned"),
    _top_k("cmoe"),
)


@dataclass(frozen=True, kw_only=True)
class GateSetting:
    """A router as a gate.

    Attributes:
        name: in the registry of routers.
        options: of the router, given the number of optimizer steps.
        label: as in `TextSetting`.
        bias_update_rate: of the selection bias.
        note: what the numbers do not say.
        left_out: why the router does not run; empty where it does.
    """

    name: str
    options: Callable[[int], Options] = lambda steps: {}
    label: str = ""
    bias_update_rate: float = 0.0
    note: str = ""
    left_out: str = ""

    @property
    def key(self) -> str:
        return self.label or self.name


_MIXES = "left out: an expert sees a mean of many examples, and no single one"
_FULL: Options = {"softmax_order": "before", "renormalize": False}  # the weight of a single expert needs a gradient


def _gates(top_k: int) -> tuple[GateSetting, ...]:
    """Every router with ``top_k`` of the experts, or as many as it can."""
    one = _FULL if top_k == 1 else {}
    both = {"top_k": top_k}
    return (
        GateSetting(name="topk", options=lambda steps: both | one),
        GateSetting(name="topk", label="softmax, dense", options=lambda steps: {"top_k": NUM_EXPERTS}, note=ALL_RUN),
        GateSetting(name="switch", note="" if top_k == 1 else "one expert, weight below 1"),
        GateSetting(name="noisy_topk", options=lambda steps: both | one),
        GateSetting(name="noaux_tc", options=lambda steps: both | one, bias_update_rate=1e-3),
        GateSetting(name="gshard", note="two experts, always" if top_k == 1 else ""),
        GateSetting(name="modified_softmax", options=lambda steps: both | one),
        GateSetting(name="sparsemixer", note="" if top_k == 1 else "one expert, weight below 1"),
        GateSetting(name="sparsemixer_v2", options=lambda steps: both),
        GateSetting(name="dselect_k", options=lambda steps: both),
        GateSetting(name="relu", options=lambda steps: both),
        GateSetting(
            name="stochastic", options=lambda steps: {"target_k": float(top_k)}, note="evaluation runs every expert"
        ),
        GateSetting(name="gumbel", label="gumbel soft", note=ALL_RUN),
        GateSetting(name="gumbel", label="gumbel hard", options=lambda steps: {"mode": "hard"}),
        GateSetting(
            name="dense_to_sparse",
            options=lambda steps: {
                "temperature_steps": steps // 2,
                "hard_after": steps // 2 if top_k == 1 else None,
            },
            note="every expert in the first half of the run" if top_k == 1 else ALL_RUN,
        ),
        GateSetting(name="expert_choice", options=lambda steps: {"capacity": float(top_k), "group": "batch"}),
        GateSetting(name="sinkhorn", options=lambda steps: {**both, "group": "batch"}),
        GateSetting(name="kmeans", options=lambda steps: {"update_every": max(steps // 10, 1)}),
        GateSetting(name="hash", options=lambda steps: both, note="ids say nothing about the example"),
        GateSetting(name="round_robin", options=lambda steps: both, note="nothing learned"),
        GateSetting(name="cmoe", options=lambda steps: both),
        GateSetting(name="soft", left_out=_MIXES),
        GateSetting(name="mixture_of_tokens", left_out=_MIXES),
    )


CLUSTERS = _gates(1)
MULTITASK = (
    *_gates(TOP_K),
    GateSetting(
        name="noisy_topk",
        label="noisy_topk, no losses",
        options=lambda steps: {"top_k": TOP_K, "importance_coef": 0.0, "load_coef": 0.0},
        note="the noise alone",
    ),
    GateSetting(
        name="gshard",
        label="gshard, no loss",
        options=lambda steps: {"balance_coef": 0.0},
        note="the dropped second experts alone",
    ),
)
