"""AutoScheme: AutoRound with a width of 2, 3, 4 or 8 bits for every layer, chosen by gradients under an average.

All widths have symmetric groups of one size, so an average of ``bits`` code bits is ``bits + 16 / group_size`` all-in.
The scores that choose are made on the comparison's windows, all of them unless option ``scheme_windows`` says fewer.
They are cached by the package under a key that knows the folder's name but not what the model or the text is; the
benchmark gives every run an empty cache.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from benchmarks.peers.auto_round import tuned
from benchmarks.peers.datasets_types import with_datasets_types
from benchmarks.peers.exchange import Made, Request, serve

WIDTHS = (2, 3, 4, 8)
CACHE = "AR_AUTO_SCHEME_CACHE"


def make(request: Request, tokens: Tensor) -> Made:
    cache = Path(request.output) / "scores"
    cache.mkdir()
    os.environ[CACHE] = str(cache)  # before the package reads it
    datasets = with_datasets_types()
    from auto_round import AutoScheme, QuantizationScheme

    scored = min(len(tokens), int(request.options.get("scheme_windows", len(tokens))))
    scheme = AutoScheme(
        avg_bits=float(request.bits),
        options=[
            QuantizationScheme(bits=bits, group_size=request.group_size, sym=True, data_type="int") for bits in WIDTHS
        ],
        ignore_scale_zp_bits=True,
        nsamples=scored,
        seqlen=tokens.shape[1],
    )
    return tuned(request, tokens, scheme, {"scored windows": str(scored), "datasets": datasets})


if __name__ == "__main__":
    serve(make)
