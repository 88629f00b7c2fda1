"""The variants of a recipe that a check or a sweep compares: other widths, numbers of experts, granularities."""

from collections.abc import Callable
from typing import Any

from moe.train.config import RunConfig, parse_config


def of_width(config: RunConfig, width: int) -> dict[str, Any]:
    """The recipe at another hidden size: heads of the same size, and FFNs in the same proportion.

    Raises:
        ValueError: a width that the proportions do not allow.
    """
    decoder = config.model.decoder
    for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
        if key not in decoder:
            raise ValueError(f"model.decoder.{key} is not set; a variant in width needs it")
    hidden, heads = decoder["hidden_size"], decoder["num_attention_heads"]
    kv_heads = decoder.get("num_key_value_heads") or heads
    changed = {
        "hidden_size": width,
        "intermediate_size": _scaled("model.decoder.intermediate_size", decoder["intermediate_size"], width, hidden),
        "num_attention_heads": _scaled("model.decoder.num_attention_heads", heads, width, hidden),
    }
    changed["num_key_value_heads"] = max(kv_heads * width // hidden, 1)
    if changed["num_attention_heads"] % changed["num_key_value_heads"]:
        raise ValueError(
            f"at width {width} there are {changed['num_attention_heads']} heads for {changed['num_key_value_heads']} "
            "key-value heads; choose widths that are multiples"
        )
    values = config.model_dump()
    values["model"]["decoder"] = decoder | changed
    if values["moe"] is not None and (expert_hidden := values["moe"]["expert_hidden"]) is not None:
        values["moe"]["expert_hidden"] = _scaled("moe.expert_hidden", expert_hidden, width, hidden)
    return values


def _scaled(field: str, value: int, width: int, hidden: int) -> int:
    if value * width % hidden:
        raise ValueError(f"{field}={value} of width {hidden} is no whole number at width {width}; choose another width")
    return value * width // hidden


def of_experts(config: RunConfig, num_experts: int) -> dict[str, Any]:
    """The recipe with another number of routed experts."""
    return _with_moe(config, num_experts=num_experts)


def of_granularity(config: RunConfig, granularity: int) -> dict[str, Any]:
    """The recipe with G times narrower experts, G times as many, of which G times as many run.

    Under muP the recipe's own granularity is the base's where the base names none.

    Raises:
        ValueError: the router has no ``top_k``, or the recipe sets the experts' width itself.
    """
    moe = _moe(config)
    if moe.get("expert_hidden") is not None:
        raise ValueError("moe.expert_hidden fixes the experts' width; set moe.granularity in its place")
    if "top_k" not in moe["router"]:
        raise ValueError("moe.router.top_k is not set; a variant in granularity scales it")
    factor = granularity / moe["granularity"]
    counts = {"num_experts": moe["num_experts"] * factor, "top_k": moe["router"]["top_k"] * factor}
    for name, count in counts.items():
        if count != int(count) or count < 1:
            raise ValueError(
                f"granularity {granularity} makes {count:g} of {name}; choose a multiple of moe.granularity"
            )
    router = moe["router"] | {"top_k": int(counts["top_k"])}
    values = _with_moe(config, num_experts=int(counts["num_experts"]), granularity=granularity, router=router)
    if (base := config.parametrization.base) is not None:
        values["parametrization"]["base"] = {"granularity": moe["granularity"], **base}
    return values


def _moe(config: RunConfig) -> dict[str, Any]:
    if config.moe is None:
        raise ValueError("moe is null: a dense recipe has no experts to vary")
    return config.moe


def _with_moe(config: RunConfig, **changed: Any) -> dict[str, Any]:
    return {**config.model_dump(), "moe": _moe(config) | changed}


# What may vary, by its option on the command line.
AXES: dict[str, Callable[[RunConfig, int], dict[str, Any]]] = {
    "width": of_width,
    "experts": of_experts,
    "granularity": of_granularity,
}
OPTIONS = {"width": "widths", "experts": "experts", "granularity": "granularity"}
EXAMPLES = {"width": "128,256,512", "experts": "4,8,16", "granularity": "1,2,4"}


def variant(config: RunConfig, axis: str, value: int) -> RunConfig:
    """The recipe at another place of an axis of `AXES`.

    Raises:
        ValueError: the recipe continues from a saved model, whose shape is given; or there is no such variant.
    """
    if config.model.init_from is not None:
        raise ValueError(
            f"model.init_from={config.model.init_from} is a model of one shape; variants start from new weights: remove it"
        )
    return parse_config(AXES[axis](config, value))


def check_values(axis: str, values: tuple[int, ...], at_least: int) -> None:
    """Raise a ValueError for places on an axis that cannot be, or fewer different ones than needed."""
    if wrong := [value for value in values if value < 1]:
        raise ValueError(f"--{OPTIONS[axis]} {wrong[0]} must be at least 1")
    if len(set(values)) < max(at_least, len(values)):
        needs = f"at least {at_least} different values" if at_least > 1 else "different values"
        raise ValueError(f"--{OPTIONS[axis]} {','.join(map(str, values))} needs {needs}, such as {EXAMPLES[axis]}")
