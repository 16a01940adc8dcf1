"""What quantization leaves of a weight, on GPUs: T - Q without the several launches that Q itself would take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lrpq.kernels.threads import usable

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from lrpq.quant.grid import QuantizedWeight


def has_kernel(T: Tensor, quantized: QuantizedWeight, H: Tensor) -> bool:
    """Whether T - Q in the dtype of H is one launch: float32 on a CUDA device, a uniform grid
    without zero points."""
    uniform = quantized.zero_points is None and not quantized.choice.trellis
    return H.is_cuda and usable(H) and T.dtype != torch.float64 and uniform


def write_residual(
    T: Float[Tensor, "d_out d_in"], quantized: QuantizedWeight, out: Float[Tensor, "d_out d_in"]
) -> Float[Tensor, "d_out d_in"]:
    """T - Q into ``out``, of any strides, which is returned."""
    from lrpq.kernels.row_errors_cuda import write_errors

    write_errors(T, quantized.codes, quantized.scales.contiguous(), out)
    return out
