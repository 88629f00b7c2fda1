"""Inputs of every FFN of a dense decoder on calibration text, layer by layer: the model is never in memory as a whole.

The windows of text pass one decoder layer after another (`moe.models.walk`). Only the layer's FFN is run here: it gives the dense
output, or that of the carved layer where calibration is sequential.

Legend: B windows, L window length, T = B * L, D model.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING

from moe.convert.carve.types import LayerInputs
from moe.convert.dense import ffn_names
from moe.models.folder import ModelFolder
from moe.models.walk import DecoderWalk, embed

FFN = Callable[[Tensor], Tensor]
_LEAST_MEAN_SQUARE = 1e-12  # of a residual stream that is zero


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
        self._hidden_BLD = embed(source, windows_BL)
        self._source, self.windows_BL = source, windows_BL
        decoder_class: Any = MODEL_MAPPING[type(config)]
        with torch.device("meta"):
            decoder = decoder_class(config).eval()
        self._walk = DecoderWalk(decoder, config, batch_size, dtype)
        self.num_layers = self._walk.num_layers
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
        self._walk.unload(self._layer)
        self._layer += 1

    def _run(self, ffn: FFN) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of the FFN (T, D), and the residual stream (B, L, D) after the layer, a batch at a time."""
        recorder = _Recorder(ffn)
        setattr(self._walk.layer(self._layer), self._ffn_name, recorder)
        for after_BLD in self._walk.run(self._hidden_BLD):
            assert recorder.x_TD is not None
            yield recorder.x_TD, after_BLD

    def _load_layer(self) -> None:
        """Read the layer but for its FFN, and put it into the decoder."""
        module = self._walk.layer(self._layer)
        setattr(module, self._ffn_name, None)
        prefix = f"model.layers.{self._layer}."
        self._walk.load(self._layer, {name: self._source.read(prefix + name).float() for name in module.state_dict()})
