"""LoRA on a whole MoE model with peft (arXiv 2106.09685), merged into the weights afterwards.

peft adapts linear layers as usual, and a stack of experts as a parameter: for the time of a forward the parameter is the
sum of the stack and its low-rank updates, one per expert. So the fused expert FFN runs on it unchanged.
"""

from typing import Any

from torch import nn

from moe.experts import ExpertBank
from moe.layer import moe_layers


def add_lora(model: Any, rank: int, alpha: int) -> Any:
    """The model with updates of every linear layer of attention and FFNs, and of every expert; only they train.

    ``merge_and_unload()`` of the result gives the model back with updates added to its weights. Routers and the output layer
    have no updates.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("recover.mode=lora needs peft: pip install peft, or use --mode full") from None
    routers = tuple(f"{name}.router." for name in moe_layers(model))
    linears = [
        name
        for name, module in model.model.named_modules(prefix="model")
        # One output: the gate of shared experts.
        if isinstance(module, nn.Linear) and not name.startswith(routers) and module.out_features > 1
    ]
    banks = [name for name, module in model.named_modules() if isinstance(module, ExpertBank)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=linears,
        target_parameters=[f"{name}.{part}" for name in banks for part in ("gate_up_proj", "down_proj")],
        lora_dropout=0.0,  # of parameters there is none
    )
    return get_peft_model(model, config)
