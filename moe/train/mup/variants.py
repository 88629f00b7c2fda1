"""The variants of a recipe that a check or a sweep compares: other widths, numbers of experts, granularities."""

from collections.abc import Callable
from typing import Any

from moe.train.config import RunConfig


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
    kv_heads = decoder.get("num_key_value_heads", heads)
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

    Raises:
        ValueError: the router has no ``top_k``, or the recipe sets the experts' width itself.
    """
    moe = config.moe or {}
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
    return _with_moe(config, num_experts=int(counts["num_experts"]), granularity=granularity, router=router)


def _with_moe(config: RunConfig, **changed: Any) -> dict[str, Any]:
    if config.moe is None:
        raise ValueError("moe is null: a dense recipe has no experts to vary")
    values = config.model_dump()
    values["moe"] = config.moe | changed
    return values


# What may vary, by its option on the command line.
AXES: dict[str, Callable[[RunConfig, int], dict[str, Any]]] = {
    "width": of_width,
    "experts": of_experts,
    "granularity": of_granularity,
}


def variant(config: RunConfig, axis: str, value: int) -> RunConfig:
    """The recipe at another place of an axis of `AXES`."""
    return RunConfig.model_validate(AXES[axis](config, value))
