"""A matrix for products with few rows: packed once for oneDNN on a CPU, else unchanged.

Decoding is bound by reading weights. Verifying six tokens should cost little more than one token,
since it reads the same weights once; but torch's plain product of 2 to 16 rows packs the matrix at
every call and takes two to three times as long as one row. With a matrix packed beforehand, as
torch.compile does when it freezes a model, it takes about 1.3 times as long.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_ROWS = 8
"""Number of rows that the packing is optimized for; others work too."""


class Matrix:
    """``F.linear`` with a fixed weight.

    Args:
        weight: Matrix [out, in]. A packed copy does not follow later changes.
        bias: Bias [out], or None.
        packed: Whether to pack it if torch and the device can.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, packed: bool = True):
        self.weight, self.bias, self.packed = weight, bias, None
        if packed and can_pack(weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)
            self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def resized(self, rows: int) -> "Matrix":
        """Return the matrix with ``rows`` outputs; new ones are always -inf."""
        missing = rows - self.weight.size(0)
        if missing <= 0:
            return Matrix(
                self.weight[:rows],
                None if self.bias is None else self.bias[:rows],
                self.packed is not None,
            )
        bias = self.weight.new_zeros(self.weight.size(0)) if self.bias is None else self.bias
        return Matrix(
            F.pad(self.weight, (0, 0, 0, missing)),
            F.pad(bias, (0, missing), value=float("-inf")),
            self.packed is not None,
        )

    def __call__(self, x: Tensor, rows: int | None = None) -> Tensor:
        """Return the product, [..., in] -> [..., out].

        Args:
            x: The factor.
            rows: Number of rows of each product of a two-dimensional factor that has a multiple
                of them, so that no row depends on how many there are; None: all at once.
        """
        if rows is not None:
            return torch.cat([self(block) for block in x.split(rows)])
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return self._multiply(x, self.packed, self.bias, "none", [], "")

    def added(self, x_ti: Tensor, to_to: Tensor, rows: int | None = None) -> Tensor:
        """Return the product of a two-dimensional tensor, added to another one."""
        if self.packed is None and self.bias is None and rows is None:
            return torch.addmm(to_to, x_ti, self.weight.t())
        return to_to + self(x_ti, rows)


def can_pack(weight: Tensor) -> bool:
    """Return whether torch can pack this matrix: on a CPU, with oneDNN, of a data type it knows."""
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
    """A factory of matrices that shares a matrix among all exits that use it.

    Attributes:
        packed: Whether matrices are packed if torch and the device can.
        num_packed_bytes: Size of the packed copies.
    """

    def __init__(self, packed: bool):
        self.packed, self._by_weight = packed, {}
        self.num_packed_bytes = 0

    def of(self, module: nn.Linear) -> Matrix:
        """Return the matrix of a linear module."""
        key = (
            module.weight.data_ptr(),
            tuple(module.weight.shape),
            None if module.bias is None else module.bias.data_ptr(),
        )
        if key not in self._by_weight:
            self._by_weight[key] = self._make(module.weight, module.bias)
        return self._by_weight[key]

    def joined(self, modules: list[nn.Linear]) -> Matrix:
        """Return the concatenated matrices of ``modules``."""
        return self._make(*join(modules))

    def _make(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        made = Matrix(weight, bias, self.packed)
        if made.packed is not None:
            self.num_packed_bytes += weight.numel() * weight.element_size()
        return made


def join(modules: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Concatenate the matrices and biases of ``modules``; the modules' own become views of them."""
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
