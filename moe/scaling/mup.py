"""muP: initial deviations, learning rates and weight decay by which hyper-parameters of a narrow model suit a wide one.

Tensor Programs V (arXiv 2203.03466, tables 3 and 8) gives them for dense networks trained by Adam; routers and experts follow from
the same rules (`docs/mup.md` derives each line). Everything is written as factors on a tensor's initial deviation, learning
rate and weight decay and nothing as a factor in the forward pass: by Adam's symmetry (multiplier m, deviation s, rate l) ~
(1, m s, m l) a factor in the forward pass can always be moved there. A model trained this way is therefore an ordinary model,
which any server loads.

The base is the narrow model on which hyper-parameters were found: every factor is 1 there. It is part of the model's config
(``mup``), so a checkpoint knows it.

Legend: r = fan_in / fan_in of the base.
"""

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moe.errors import nearest
from moe.experts import ExpertBank
from moe.routers import Router

# What a base may set: of the decoder, and of the experts.
DECODER_KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
EXPERT_KEYS = ("expert_hidden", "granularity")


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Of one tensor, relative to the base model.

    Attributes:
        init: on its initial values.
        lr: on the learning rate and on Adam's eps.
        weight_decay: on the decay coefficient, so that rate times decay is the base's (decoupled decay).
    """

    init: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0

    def times(self, multiplier: float) -> "Factors":
        """As if the forward pass multiplied the tensor by ``multiplier``."""
        return Factors(
            init=self.init * multiplier, lr=self.lr * multiplier, weight_decay=self.weight_decay / multiplier
        )


# What a tensor does as width grows, and its factors at r. Roles of a router's tensors: `Router.width_roles`.
ROLES: dict[str, Callable[[float], Factors]] = {
    "input": lambda r: Factors(),  # finite -> width: embeddings
    "vector": lambda r: Factors(),  # norms and biases
    "hidden": lambda r: Factors(init=r**-0.5, lr=1 / r, weight_decay=r),  # width -> width
    "output": lambda r: Factors(init=1 / r, lr=1 / r, weight_decay=r),  # width -> finite: unembedding, router, gates
    "unit_input": lambda r: Factors(
        init=r**-0.5, lr=r**-0.5, weight_decay=r**0.5
    ),  # the same, of inputs of unit length
    "normalized": lambda r: Factors(),  # used divided by its norm: its direction turns by lr / deviation
}


def check_base(base: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raise a ValueError that names what is missing from, or wrong in, a base for a model's config."""
    decoder, moe = config.get_text_config(), getattr(config, "moe", None)
    expert_hidden = (moe or {}).get("expert_hidden")
    known = DECODER_KEYS + EXPERT_KEYS
    for key, value in base.items():
        if key not in known:
            raise ValueError(f"parametrization.base.{key} is not a width; {nearest(str(key), known)}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"parametrization.base.{key}={value!r} must be a positive whole number")
    needed = ["hidden_size", "intermediate_size", "num_attention_heads"]
    needed += ["head_dim"] if _sets_head_dim(decoder) else []
    needed += ["expert_hidden"] if expert_hidden is not None else []
    if missing := [key for key in needed if key not in base]:
        own = {key: expert_hidden if key == "expert_hidden" else getattr(decoder, key) for key in missing}
        raise ValueError(
            f"parametrization.base lacks {', '.join(missing)}: give the widths of the model whose hyper-parameters these are "
            f"(this one has {', '.join(f'{key}={value}' for key, value in own.items())})"
        )
    if "expert_hidden" in base and expert_hidden is None:
        raise ValueError("parametrization.base.expert_hidden is set and moe.expert_hidden is not; remove it")
    if "granularity" in base and (moe is None or expert_hidden is not None):
        why = "there are no experts" if moe is None else "moe.expert_hidden sets the experts' width"
        raise ValueError(f"parametrization.base.granularity is set and {why}; remove it")


def _sets_head_dim(decoder: PreTrainedConfig) -> bool:
    """Whether the width of a head is not what the other fields make it."""
    head_dim = getattr(decoder, "head_dim", None)
    return head_dim is not None and head_dim * decoder.num_attention_heads != decoder.hidden_size


def base_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The base model's config: that of the model with the widths of its ``mup``.

    Raises:
        ValueError: the base is wrong for this model.
    """
    widths = dict(config.mup)
    check_base(widths, config)
    values = {key: value for key, value in copy.deepcopy(config).to_dict().items() if key != "mup"}
    decoder = values.get("text_config", values)
    values.get("moe", {}).update({key: widths.pop(key) for key in EXPERT_KEYS if key in widths})
    if "head_dim" not in widths:
        decoder["head_dim"] = widths["hidden_size"] // widths["num_attention_heads"]
    if "num_key_value_heads" not in widths:
        kept = config.get_text_config().num_attention_heads // config.get_text_config().num_key_value_heads
        widths["num_key_value_heads"] = max(widths["num_attention_heads"] // kept, 1)
    decoder.update(widths)
    return type(config).from_dict(values)


def _base_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Without memory."""
    check_base(config.mup, config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(base_config(config), dtype=torch.float32)
    except (ValueError, StrictDataclassError) as problem:
        _, _, reason = str(problem).splitlines()[-1].rpartition("ValueError: ")
        raise ValueError(f"parametrization.base={config.mup} makes no model: {reason.strip()}") from None


def muon_factors(shape: torch.Size, base: torch.Size) -> Factors:
    """Factors of a hidden matrix (or stack of them) that Muon steps with an update of 0.2 sqrt(max(out, in)) times the rate.

    An update of norm 1 changes outputs by sqrt(in / out), so the rate goes as sqrt(out / in): the spectral condition
    (arXiv 2310.17813). What the optimizer multiplies by itself is taken out.
    """
    r_out, r_in = shape[-2] / base[-2], shape[-1] / base[-1]
    lr = (r_out / r_in * max(base[-2:]) / max(shape[-2:])) ** 0.5
    return Factors(init=r_in**-0.5, lr=lr, weight_decay=1 / lr)


def width_factors(model: nn.Module, muon: Collection[str] = ()) -> dict[str, Factors]:
    """Factors of every parameter by name; all 1 for a model without ``config.mup``.

    Args:
        model: the model.
        muon: names of the parameters that Muon steps and not Adam.

    Raises:
        ValueError: the base is wrong, or has other parameters than the model; names them.
    """
    if not (isinstance(model, PreTrainedModel) and getattr(model.config, "mup", None) is not None):
        return {name: Factors() for name, _ in model.named_parameters()}
    base = _base_model(model.config)
    shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    found = {}
    for name, parameter, role, init_exponent in _roles(model):
        if name not in shapes:
            raise ValueError(f"parametrization.base makes a model without {name}; only widths may differ")
        r = parameter.shape[-1] / shapes[name][-1]
        factors = muon_factors(parameter.shape, shapes[name]) if name in muon else ROLES[role](r)
        found[name] = Factors(init=factors.init * r**init_exponent, lr=factors.lr, weight_decay=factors.weight_decay)
    _granularity(model, base, found)
    _attention(model, base, found)
    if _tied(model):  # the unembedding is an input weight, so its 1 / r goes to the norm before it
        name = "model.norm.weight"
        found[name] = found[name].times(base.config.get_text_config().hidden_size / _width(model))
    return found


def _roles(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, str, float]]:
    """Name, parameter, role, and the e of an initial deviation that shrinks as fan_in ** -e by itself."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    for prefix, module in model.named_modules():
        if isinstance(module, Router):
            for name, parameter in module.named_parameters():
                role = module.width_roles()[name]
                yield f"{prefix}.{name}", parameter, role.role, role.init_exponent
            continue
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}"
            if parameter.dim() < 2:
                yield path, parameter, "vector", 0.0
            elif isinstance(module, nn.Embedding):
                yield path, parameter, "input", 0.0
            elif module is head:
                if not _tied(model):
                    yield path, parameter, "output", 0.0
            elif isinstance(module, nn.Linear):
                is_gate = prefix.endswith("shared_experts.gate")
                yield path, parameter, "output" if is_gate else "hidden", 0.0
            elif isinstance(module, ExpertBank):
                yield path, parameter, "hidden", 0.0
            else:
                raise ValueError(
                    f"parametrization=mup has no rule for {path} of a {type(module).__name__}; use parametrization.name="
                    "standard"
                )


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices between widths: of attention, FFNs and experts; no embedding, unembedding, router or gate."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head, routers = get_head(), [name for name, module in model.named_modules() if isinstance(module, Router)]
    found = set()
    for prefix, module in model.named_modules():
        if (
            module is head
            or prefix.endswith("shared_experts.gate")
            or f"{prefix}.".startswith(tuple(f"{r}." for r in routers))
        ):
            continue
        if isinstance(module, (nn.Linear, ExpertBank)):
            found |= {f"{prefix}.{name}" for name, p in module.named_parameters(recurse=False) if p.dim() >= 2}
    return found


def _granularity(model: PreTrainedModel, base: PreTrainedModel, found: dict[str, Factors]) -> None:
    """G times as many experts of 1 / G of the weight start as independent: their sum shrinks as 1 / sqrt(G)."""
    if "granularity" not in model.config.mup:
        return
    ratio = model.config.moe["granularity"] / base.config.moe["granularity"]
    for name, factors in found.items():
        if name.endswith(".mlp.experts.down_proj"):
            found[name] = replace(factors, init=factors.init * ratio**0.5)


def _attention(model: PreTrainedModel, base: PreTrainedModel, found: dict[str, Factors]) -> None:
    """Scores scale as 1 / head_dim, where decoders divide by its root: the rest goes to the queries."""
    head_dims = [_head_dim(each.config.get_text_config()) for each in (model, base)]
    ratio = (head_dims[1] / head_dims[0]) ** 0.5
    for name in found:
        layer, _, last = name.partition(".self_attn.")
        if not last:
            continue
        normed = f"{layer}.self_attn.q_norm.weight" in found  # a norm after the projection undoes its scale
        if last.startswith("q_norm.") if normed else last.startswith("q_proj."):
            found[name] = found[name].times(ratio)


def _head_dim(decoder: PreTrainedConfig) -> int:
    return getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads


def _width(model: PreTrainedModel) -> int:
    return model.config.get_text_config().hidden_size


def _tied(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings)  # while a model is loaded they are not tied yet


@torch.no_grad()
def scale_initial(model: PreTrainedModel, names: set[str] | None = None) -> None:
    """Give freshly initialised parameters their muP deviations, in place; ``names`` restricts it to some of them."""
    if getattr(model.config, "mup", None) is None or names == set():
        return
    for name, factors in width_factors(model).items():
        if factors.init != 1.0 and (names is None or name in names):
            model.get_parameter(name).mul_(factors.init)
