"""Machine code of the compiled loops, made before a layer waits for it."""

from __future__ import annotations

import torch

from lrpq.model.layers import Choice
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.polish import polish

_WIDTH = 256
_STREAM = 16
"""Rows and columns with trellis codes: as few as make a segment."""


def compile_ahead() -> None:
    """Quantize and polish a small layer on the CPU, which calls every loop of lrpq.kernels.loops but those of trellis
    codes.

    The first time on a machine numba compiles for seconds; later it reads what it has kept.
    """
    W = torch.linspace(-1, 1, _WIDTH * _WIDTH).view(_WIDTH, _WIDTH)
    H = torch.eye(_WIDTH)
    polish(W, gptq(W, factorize(H), [Choice(bits=4, group_size=64)]), H)


def compile_trellis_ahead() -> None:
    """The same for the loops of trellis codes, which most compressions have no use for."""
    W = torch.linspace(-1, 1, _STREAM * _STREAM).view(_STREAM, _STREAM)
    gptq(W, factorize(torch.eye(_STREAM)), [Choice(bits=3, group_size=_STREAM, trellis=True)])
