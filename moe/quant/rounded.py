"""A quantised decoder layer, as the engine makes it, containers store it and the runtime loads it."""

from dataclasses import dataclass

from torch import Tensor

from moe.quant.grids import Rounded


@dataclass(frozen=True, kw_only=True)
class RoundedLayer:
    """One layer, by names below ``model.layers.N.`` in the state of `MoEForCausalLM`.

    Attributes:
        rounded: quantised parameters; experts stacked: ``mlp.experts.gate_up_proj`` (E, H, D).
        rest: the other parameters and buffers (norms, biases, routers), in the dtype of the checkpoint.
    """

    rounded: dict[str, Rounded]
    rest: dict[str, Tensor]
