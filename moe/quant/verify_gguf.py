"""Whether a quantised GGUF file holds the codes and scales that were chosen, and whether llama.cpp computes with them.

On CPU llama.cpp rounds the rows that reach a quantised matrix as well, to 8 bits in blocks of 32, and those that reach the
unembedding to fp16. What it computes is compared with our model that does the same.

Legend: B windows, L window length.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe.models import MoEForCausalLM
from moe.models.compare import LogitComparison
from moe.models.gguf.verify import check_file, compare_with_llama_cpp
from moe.models.verify import summary
from moe.quant.containers.gguf import BLOCK, Gguf
from moe.quant.grids import IntGrid
from moe.quant.load import load_simulated
from moe.quant.simulate import quantize_activations

# The bits of the file are compared exactly; this tells whether llama.cpp makes sense of it. Its rounding of rows alone costs a real
# model some 3 %: on SmolLM2 with 8 experts 96.3 % agree in 4 bits and 97.1 % in 8, and all do with the same weights in fp32.
LEAST_SAME_TOP1 = 0.9


@dataclass(frozen=True, kw_only=True)
class LlamaRows(IntGrid):
    """Activations as ggml's ``quantize_row_q8_0`` rounds them: by 127 over the largest magnitude, which is stored as fp16."""

    bits: int = 8
    group_size: int | None = BLOCK

    def simulate(self, values: Tensor) -> Tensor:
        """See `Grid`."""
        groups = self.grouped(values.float())
        most = groups.abs().amax(-1, keepdim=True)
        codes = (groups * torch.where(most > 0, 127 / most, 0.0)).round()
        return (codes * (most / 127).half().float()).flatten(-2).to(values.dtype)


def load_as_llama_cpp(folder: Path) -> MoEForCausalLM:
    """The model that llama.cpp computes from the GGUF file of a quantised folder, in fp32."""
    model = load_simulated(folder, round_activations=False)
    for layer in model.model.layers:
        quantize_activations(layer, LlamaRows())
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight.data = module.weight.data.half().float()
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].half().float(),))
    return model


def verify_gguf(folder: Path, path: Path, windows_BL: Tensor) -> LogitComparison:
    """Compare a file with the folder that it was made of, tensor by tensor, and with llama.cpp's logits.

    Args:
        folder: quantised, as `Gguf.write_layer` makes it.
        path: the file.
        windows_BL: token ids.

    Raises:
        ValueError: something differs, or ``llama_cpp`` is not installed.
    """
    model, storage = Gguf().contents(folder)
    check_file(model, path, storage)
    found = compare_with_llama_cpp(load_as_llama_cpp(folder), path, windows_BL)
    if not found.same_top1 >= LEAST_SAME_TOP1:
        raise ValueError(
            f"llama.cpp computes something else from {path}: same most likely token {found.same_top1:.1%} of the time, less than "
            f"{LEAST_SAME_TOP1:.0%}; {summary(found)}"
        )
    return found
