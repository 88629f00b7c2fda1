"""A linear layer with a packed weight, in the place of an `nn.Linear` for inference.

Legend: P output features, Q input features, G groups of Q.
"""

from torch import Tensor, nn

from moe.kernels import ops
from moe.kernels.quantized import QuantizedWeight
from moe.quantized_module import QuantizedModule, in_autocast_dtype


class QuantizedLinear(QuantizedModule):
    """Rows times a weight of 4 or 8 bits, plus a bias.

    Its buffers have the names and shapes of a compressed-tensors checkpoint of format "pack-quantized": ``weight_packed``
    (P, ceil(Q bits / 32)) int32, ``weight_scale`` (P, G) and, with zero points, ``weight_zero_point``.

    Args:
        weight: (1, P, Q).
        bias: (P,), or ``None``.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__({"weight": weight}, stacked=False)
        _, self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., Q) -> (..., P)."""
        x = in_autocast_dtype(x)
        rows_nQ = x.reshape(-1, self.in_features)
        y_nP = ops.linear_quantized(rows_nQ, self.multipliers(rows_nQ)["weight"])
        if self.bias is not None:
            y_nP = y_nP + self.bias.to(y_nP.dtype)
        return y_nP.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, group_size={self._forms['weight'].group_size}"
        )
