"""What a layer's matrices see on calibration text.

Legend: T tokens, D model, Q reduced columns, n rows of one matrix, F expert FFN, E experts.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from moe.kernels.reference import activate
from moe.quant.layer import UP, Matrix, banks


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Input of one matrix.

    Attributes:
        x_nQ: fp32 rows that reach it.
        weights_n: fp32, with what weight its output counts: an expert's combine weight, 1 elsewhere.
    """

    x_nQ: Tensor
    weights_n: Tensor


@dataclass(kw_only=True)
class LayerInputs:
    """Of one decoder layer, on the residual stream that the layers below it leave.

    Attributes:
        linear: (T, Q) fp32 input of each `nn.Linear`, by module name; matrices with the same input share one tensor.
        ffn_TD: input of the MoE; ``None`` in a dense layer. With calibration balanced it has tokens of the reserve at its end.
        tokens_e: of each expert e, which rows of ``ffn_TD`` it is calibrated on.
        weights_e: their combine weights.
        counts_E: tokens that the router sent to each expert, before balancing.
    """

    linear: dict[str, Tensor]
    ffn_TD: Tensor | None = None
    tokens_e: list[Tensor] = field(default_factory=list)
    weights_e: list[Tensor] = field(default_factory=list)
    counts_E: Tensor | None = None

    @property
    def calibration_TD(self) -> Tensor:
        """Rows of ``ffn_TD`` that are no reserve: what statistics of the whole layer are taken from."""
        assert self.ffn_TD is not None
        num_calibration = min((len(x_TQ) for x_TQ in self.linear.values()), default=len(self.ffn_TD))
        return self.ffn_TD[:num_calibration]

    def rows(self, layer: nn.Module, matrix: Matrix) -> Rows:
        """Input of ``matrix``; that of an expert's down-projection is made by the layer's up-projection as it is now."""
        if matrix.expert is None:
            x_nQ = self.linear[matrix.name.removesuffix(".weight")]
            return Rows(x_nQ=x_nQ, weights_n=x_nQ.new_ones(len(x_nQ)))
        assert self.ffn_TD is not None
        x_nD, weights_n = self.ffn_TD[self.tokens_e[matrix.expert]], self.weights_e[matrix.expert]
        if matrix.name.endswith(UP):
            return Rows(x_nQ=x_nD, weights_n=weights_n)
        (bank,) = banks(layer).values()
        up_HD = bank.gate_up_proj.data[matrix.expert]
        return Rows(x_nQ=activate(x_nD @ up_HD.T, bank.activation), weights_n=weights_n)
