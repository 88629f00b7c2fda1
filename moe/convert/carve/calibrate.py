"""Inputs of every FFN of a dense decoder on calibration text, layer by layer: the model is never in memory as a whole.

The windows of text pass one decoder layer after another. A layer is transformers' own, inside transformers' own decoder whose
other layers pass their input on, so masks, rotary embeddings and attention are those of the model itself. Only the layer's
FFN is run here: it gives the dense output, or that of the carved layer where calibration is sequential.

Legend: B windows, L window length, T = B * L, D model.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig

from moe.convert.carve.types import LayerInputs
from moe.convert.dense import ffn_names
from moe.models.folder import ModelFolder

FFN = Callable[[Tensor], Tensor]
_LEAST_MEAN_SQUARE = 1e-12  # of a residual stream that is zero


class _PassOn(nn.Module):
    """A decoder layer that does nothing."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Its input."""
        return hidden_states


class _Recorder(nn.Module):
    """In the place of an FFN: computes ``ffn``, and keeps its input."""

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self._ffn = ffn
        self.x_TD: Tensor | None = None

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The FFN's output."""
        self.x_TD = x_BLD.flatten(0, 1)
        return self._ffn(self.x_TD).view_as(x_BLD)


class CalibrationWalk:
    """Carries windows of text through a dense decoder: `enter` a layer, look at its FFN's inputs, `leave` it for the next.

    Args:
        source: a dense decoder that `moe.convert.dense` knows.
        windows_BL: int64 token ids.
        dtype: fp32, or bf16 for the matrix products of the layers; the residual stream stays fp32 either way.
        batch_size: windows at a time.

    Raises:
        ValueError: an architecture not known, or a token id outside the vocabulary.
    """

    def __init__(
        self, source: ModelFolder, windows_BL: Tensor, dtype: torch.dtype = torch.float32, batch_size: int = 2
    ) -> None:
        config = source.config
        self._ffn_name, _, projection = ffn_names(config).up.partition(".")
        assert projection and "." not in projection, "the FFN is a child of the layer"
        vocab_size = source.shape("model.embed_tokens.weight")[0]
        if int(windows_BL.max()) >= vocab_size:
            raise ValueError(
                f"token id {int(windows_BL.max())} is not in the model's vocabulary of {vocab_size}; "
                "use the tokenizer of the model's own folder"
            )
        self._source, self._dtype, self._batch_size = source, dtype, batch_size
        self.windows_BL = windows_BL
        self.num_layers = int(config.num_hidden_layers)
        self._decoder = _empty_decoder(config)
        self._layers = list(self._decoder.layers)
        self._decoder.layers = nn.ModuleList(_PassOn() for _ in self._layers)
        self._check_passes_on(config)
        # Only rows of tokens that occur, since a large vocabulary's matrix is as large as several layers.
        ids_U, positions_BL = windows_BL.unique(return_inverse=True)
        rows_UD = source.read("model.embed_tokens.weight")[ids_U].float()
        self._hidden_BLD = rows_UD[positions_BL]
        self._after_BLD: Tensor | None = None
        self._layer = 0

    @property
    def hidden_BLD(self) -> Tensor:
        """(B, L, D) fp32 residual stream before the layer that is entered next."""
        assert self._after_BLD is None, "leave the layer first"
        return self._hidden_BLD

    def enter(self, ffn: FFN) -> LayerInputs:
        """Run the next layer; tokens are weighted by the residual stream after it.

        Args:
            ffn: the layer's dense FFN, from (T, D) to (T, D).
        """
        assert self._after_BLD is None, "leave the layer first"
        self._load_layer()
        found, after = [], []
        for x_TD, after_BLD in self._run(ffn):
            found.append(x_TD.float())
            after.append(after_BLD)
        self._after_BLD = torch.cat(after)
        num_windows, length = self.windows_BL.shape
        return LayerInputs(
            x_TD=torch.cat(found),
            weights_T=1 / self._after_BLD.square().mean(-1).flatten().clamp_min(_LEAST_MEAN_SQUARE),
            sequence_T=torch.arange(num_windows).repeat_interleave(length),
        )

    def leave(self, ffn: FFN | None = None) -> None:
        """Go on to the next layer with the dense FFN's output, or run this one again with another FFN, the carved one."""
        assert self._after_BLD is not None, "enter a layer first"
        if ffn is None:
            self._hidden_BLD = self._after_BLD
        else:
            self._hidden_BLD = torch.cat([after_BLD for _, after_BLD in self._run(ffn)])
        self._after_BLD = None
        self._decoder.layers[self._layer] = self._layers[self._layer] = _PassOn()
        self._layer += 1

    @torch.no_grad()
    def _run(self, ffn: FFN) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of the FFN (T, D), and the residual stream (B, L, D) after the layer, a batch at a time."""
        recorder = _Recorder(ffn)
        setattr(self._decoder.layers[self._layer], self._ffn_name, recorder)
        for chunk_BLD in self._hidden_BLD.split(self._batch_size):
            with torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16):
                after_BLD = self._decoder(inputs_embeds=chunk_BLD, use_cache=False).last_hidden_state
            assert recorder.x_TD is not None
            yield recorder.x_TD, after_BLD.float()

    def _load_layer(self) -> None:
        """Read the layer but for its FFN, and put it into the decoder."""
        module = self._layers[self._layer]
        setattr(module, self._ffn_name, None)
        prefix = f"model.layers.{self._layer}."
        state = {name: self._source.read(prefix + name).float() for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        self._decoder.layers[self._layer] = module

    @torch.no_grad()
    def _check_passes_on(self, config: PreTrainedConfig) -> None:
        embedded_BLD = torch.ones(1, 2, config.hidden_size)
        if not torch.equal(self._decoder(inputs_embeds=embedded_BLD, use_cache=False).last_hidden_state, embedded_BLD):
            raise ValueError(
                f"model_type={config.model_type!r} changes its embeddings before the first layer, which calibration layer by "
                "layer does not know; carve a Llama-, Mistral- or Qwen-like decoder"
            )


def _empty_decoder(config: PreTrainedConfig) -> Any:
    """The decoder of a model on the meta device, without a final norm; ``layers`` are to be loaded one at a time."""
    decoder_class: Any = MODEL_MAPPING[type(config)]
    with torch.device("meta"):
        decoder = decoder_class(config).eval()
    decoder.requires_grad_(False)
    # Not meta tensors that a checkpoint would fill: computed when it is made.
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config)
    decoder.norm = nn.Identity()
    return decoder
