"""Carries text through a decoder one layer at a time, so that the model is never in memory as a whole.

A layer is transformers' own (or ours), inside transformers' own decoder whose other layers pass their input on, so masks, rotary
embeddings and attention are those of the model itself.

Legend: B windows, L window length, U distinct tokens, V vocabulary, D model.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moe.models.folder import ModelFolder

EMBEDDINGS = "model.embed_tokens.weight"


class _PassOn(nn.Module):
    """A decoder layer that does nothing."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Its input."""
        return hidden_states


class DecoderWalk:
    """A decoder of which one layer at most has weights: `load` it, `run` text through it any number of times, `unload` it.

    Args:
        decoder: on the meta device, in eval mode: the module with ``layers``, ``norm`` and ``rotary_emb``.
        config: the decoder's.
        batch_size: windows at a time.
        dtype: fp32, or bf16 for the matrix products of the layers; the residual stream stays fp32 either way.
        device: where layers compute.

    Raises:
        ValueError: the architecture does something to its embeddings before the first layer.
    """

    def __init__(
        self,
        decoder: Any,
        config: PreTrainedConfig,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._decoder = decoder.requires_grad_(False)
        self._batch_size, self._dtype, self._device = batch_size, dtype, torch.device(device)
        self._layers: list[nn.Module] = list(self._decoder.layers)
        self._decoder.layers = nn.ModuleList(_PassOn() for _ in self._layers)
        # Not meta tensors that a checkpoint would fill: computed when it is made.
        self._decoder.rotary_emb = type(self._decoder.rotary_emb)(config=config).to(self._device)
        self._decoder.norm = nn.Identity()
        self._check_passes_on(config)

    @property
    def num_layers(self) -> int:
        """Of the decoder."""
        return len(self._layers)

    def layer(self, layer: int) -> nn.Module:
        """A layer: without weights before `load`, with them after; what is set on it stays."""
        return self._layers[layer]

    def load(self, layer: int, state: Mapping[str, Tensor]) -> nn.Module:
        """Give a layer its weights by their names below it, and put it in its place.

        Args:
            layer: its index.
            state: all parameters and buffers of it.
        """
        module = self._layers[layer]
        module.load_state_dict({name: tensor.to(self._device) for name, tensor in state.items()}, assign=True)
        # What a checkpoint does not hold.
        hollow = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
        assert not hollow, f"no values for {hollow}"
        self._decoder.layers[layer] = module.requires_grad_(False)
        return module

    def unload(self, layer: int) -> None:
        """Let go of a layer."""
        self._decoder.layers[layer] = self._layers[layer] = _PassOn()

    @torch.no_grad()
    def run(self, hidden_BLD: Tensor, before: Callable[[slice], None] | None = None) -> Iterator[Tensor]:
        """The fp32 residual stream after the loaded layer, a batch of windows at a time, on the layer's device.

        Args:
            hidden_BLD: the stream before it, on any device.
            before: called with the windows of each batch before it runs.
        """
        for start in range(0, len(hidden_BLD), self._batch_size):
            chunk_BLD = hidden_BLD[start : start + self._batch_size]
            if before is not None:
                before(slice(start, start + len(chunk_BLD)))
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
                after_BLD = self._decoder(inputs_embeds=chunk_BLD.to(self._device), use_cache=False).last_hidden_state
            yield after_BLD.float()

    def _check_passes_on(self, config: PreTrainedConfig) -> None:
        embedded_BLD = torch.ones(1, 2, config.hidden_size)
        (passed_BLD,) = self.run(embedded_BLD)
        if not torch.equal(passed_BLD.cpu(), embedded_BLD):
            raise ValueError(
                f"model_type={config.model_type!r} changes its embeddings before the first layer, which calibration layer by "
                "layer does not know; use a Llama-, Mistral- or Qwen-like decoder"
            )


def embed(source: ModelFolder, windows_BL: Tensor) -> Tensor:
    """(B, L, D) fp32 embeddings.

    Only rows of tokens that occur are read on, since a large vocabulary's matrix is as large as several layers.

    Raises:
        ValueError: a token id outside the vocabulary.
    """
    vocab_size = source.shape(EMBEDDINGS)[0]
    if int(windows_BL.max()) >= vocab_size:
        raise ValueError(
            f"token id {int(windows_BL.max())} is not in the model's vocabulary of {vocab_size}; "
            "use the tokenizer of the model's own folder"
        )
    ids_U, positions_BL = windows_BL.unique(return_inverse=True)
    rows_UD = source.read(EMBEDDINGS)[ids_U].float()
    return rows_UD[positions_BL]
