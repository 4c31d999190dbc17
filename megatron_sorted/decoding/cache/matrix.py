"""A matrix that reads few rows fast: on a CPU packed once for oneDNN, else as it is.

Decoding is bound by reading weights. Verification of six tokens should cost little more than one token, since it reads the same weights
once; torch's plain product of 2 to 16 rows packs the matrix anew at every call and takes two to three times one row's time. Packed
beforehand, as torch.compile does when it freezes a model, it takes about 1.3 times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_ROWS = 8
"""Rows that the packing is made for; others work too."""


class Matrix:
    """``F.linear`` with a fixed weight.

    Args:
        weight: [out, in]. Where it is packed a copy of it is kept, and later changes of it are not seen.
        bias: [out] or None.
        packed: Whether to pack it; only on a CPU whose torch can.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, packed: bool = True):
        self.weight, self.bias, self.packed = weight, bias, None
        if packed and can_pack(weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)

    def resized(self, rows: int) -> "Matrix":
        """Return the matrix with the first ``rows`` outputs; those that it lacks are -inf whatever comes in."""
        lacking = rows - self.weight.size(0)
        if lacking <= 0:
            return Matrix(
                self.weight[:rows],
                None if self.bias is None else self.bias[:rows],
                self.packed is not None,
            )
        bias = self.weight.new_zeros(self.weight.size(0)) if self.bias is None else self.bias
        return Matrix(
            F.pad(self.weight, (0, 0, 0, lacking)),
            F.pad(bias, (0, lacking), value=float("-inf")),
            self.packed is not None,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., out] of [..., in]."""
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Return whether torch can pack this matrix: numbers oneDNN knows, on a CPU, in a build that has it."""
    if (
        weight.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or not torch.backends.mkldnn.enabled
    ):
        return False
    known = weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return (
        known
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class Matrices:
    """Make each matrix once, however many exits read with it."""

    def __init__(self, packed: bool):
        self.packed, self._made = packed, {}

    def of(self, module: nn.Linear) -> Matrix:
        """Return the matrix of a linear module."""
        key = (
            module.weight.data_ptr(),
            tuple(module.weight.shape),
            None if module.bias is None else module.bias.data_ptr(),
        )
        if key not in self._made:
            self._made[key] = Matrix(module.weight, module.bias, self.packed)
        return self._made[key]

    def joined(self, modules: list[nn.Linear]) -> Matrix:
        """Return the matrices of ``modules`` one below the other."""
        return Matrix(*join(modules), self.packed)


def join(modules: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Return the matrices of ``modules`` one below the other, and their biases; the modules become views of them."""
    with torch.no_grad():
        weight = torch.cat([module.weight for module in modules])
        bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
        first = 0
        for module in modules:
            rows = slice(first, first + module.out_features)
            module.weight.data = weight[rows]
            if bias is not None:
                module.bias.data = bias[rows]
            first += module.out_features
    return weight, bias
