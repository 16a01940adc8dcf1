"""Machine code of the compiled loops, made before a layer waits for it."""

from __future__ import annotations

import torch

from lrpq.model.layers import Choice
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.polish import polish

_WIDTH = 256


def compile_ahead() -> None:
    """Quantize and polish a small layer on the CPU, which calls every loop of lrpq.kernels.loops but those of
    trellis codes, which no compression has yet.

    The first time on a machine numba compiles for seconds; later it reads what it has kept.
    """
    W = torch.linspace(-1, 1, _WIDTH * _WIDTH).view(_WIDTH, _WIDTH)
    H = torch.eye(_WIDTH)
    polish(W, gptq(W, factorize(H), [Choice(bits=4, group_size=64)]), H)
