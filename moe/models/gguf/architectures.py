"""Architectures of llama.cpp that compute models of ours; adding one is an entry of `MOE_ARCHITECTURES`.

Each is like a stock architecture of transformers, with limits of its own. What llama.cpp does was read in its sources
(``src/models/*.cpp``, ``src/llama-graph.cpp``) and is tested by running it.
"""

from dataclasses import dataclass, replace

from moe.models.gguf.source import GGUFSource
from moe.models.stock import fit
from moe.models.stock.decoder import describe
from moe.models.stock.family import StockFormat
from moe.models.stock.fit import Limits
from moe.models.stock.sigmoid import GLM4_MOE
from moe.models.stock.softmax import MIXTRAL, QWEN2_MOE, QWEN3_MOE

MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One value of ``general.architecture``.

    Attributes:
        name: that value.
        like: the stock architecture, whose rewriting of weights makes a model fit; ``None`` for a dense one.
        limits: what it can compute.
        pairs_interleaved: rotary dimensions are pairs of neighbours, so rows of q and k are reordered; else halves, as
            transformers has them.
        rope_types: kinds of rotary embedding that it reads.
        ffn_norm: name of the norm before the FFN.
        expert_width_key: where the width of experts goes.
        needs_output: the output matrix must be there even if it is the embedding's.
        generic_gate: reads scoring function, normalisation, scale, groups and selection bias of the gate, and how many
            dense layers are below; always adds shared experts.
    """

    name: str
    like: StockFormat | None
    limits: Limits
    pairs_interleaved: bool = False
    rope_types: tuple[str, ...] = ("default", "linear")
    ffn_norm: str = "ffn_norm"
    expert_width_key: str = "expert_feed_forward_length"
    needs_output: bool = False
    generic_gate: bool = False


_ANY = (False, True)
LLAMA = Architecture(
    name="llama",  # Mixtral too
    like=MIXTRAL,
    limits=replace(MIXTRAL.limits, qkv_bias=_ANY, output_bias=_ANY, windows="none"),
    pairs_interleaved=True,
    rope_types=("default", "linear", "llama3"),
    expert_width_key="feed_forward_length",
)
# In order of preference.
MOE_ARCHITECTURES = (
    LLAMA,
    Architecture(
        name="qwen3moe",
        like=QWEN3_MOE,
        limits=replace(QWEN3_MOE.limits, renormalize=True, dense_layers="none", output_bias=(False,), windows="none"),
    ),
    Architecture(
        name="glm4moe",
        like=GLM4_MOE,
        limits=replace(GLM4_MOE.limits, score="any"),
        ffn_norm="post_attention_norm",
        generic_gate=True,
    ),
    Architecture(  # norm_topk_prob is not read
        name="qwen2moe",
        like=QWEN2_MOE,
        limits=replace(QWEN2_MOE.limits, renormalize=False, dense_layers="none"),
        needs_output=True,
    ),
)
DENSE_ARCHITECTURES = (
    replace(LLAMA, like=None),
    Architecture(name="qwen3", like=None, limits=replace(QWEN3_MOE.limits, output_bias=(False,), windows="none")),
)


def choose_architecture(source: GGUFSource) -> Architecture:
    """The first architecture that computes the model.

    Raises:
        ValueError: none does; names for each the properties with their values.
    """
    tried: list[str] = []
    for architecture in DENSE_ARCHITECTURES if source.config is None else MOE_ARCHITECTURES:
        problems = _of_model(source, architecture) + _of_file(source, architecture)
        if not problems:
            return architecture
        tried.append(f"{architecture.name}: " + "; ".join(problems))
    raise ValueError("the model fits no architecture of llama.cpp\n" + "\n".join(tried))


def _of_model(source: GGUFSource, architecture: Architecture) -> list[str]:
    if source.config is not None:
        return fit.refusals(source.config, architecture.limits, architecture.name)
    try:
        decoder = describe(source.decoder)
    except ValueError as problem:
        return [str(problem)]
    found = fit.of_attention(source.decoder, decoder, architecture.limits)
    if source.decoder.hidden_act not in ("silu", "swish"):
        found.append(f"hidden_act={source.decoder.hidden_act!r}: it computes silu")
    if decoder.mlp_bias:
        found.append("mlp_bias=true: it has none")
    return found


def _of_file(source: GGUFSource, architecture: Architecture) -> list[str]:
    """What transformers' architecture of the kind can do and llama.cpp cannot."""
    found = []
    if source.rope_type not in architecture.rope_types:
        found.append(f"rope_type={source.rope_type!r}: it has {', '.join(architecture.rope_types)}")
    if source.config is not None and source.config.spec.num_experts > MAX_EXPERTS:
        found.append(f"moe.num_experts={source.config.spec.num_experts}: at most {MAX_EXPERTS}")
    return found
