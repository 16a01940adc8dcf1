"""What is compiled ahead is what layers need."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, torch
from numba.core.registry import CPUDispatcher
from lrpq.kernels import loops
from lrpq.model.layers import Choice
from lrpq.quant.ahead import compile_ahead, compile_trellis_ahead
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.polish import polish

def compiled():
    found = {name: loop for name, loop in vars(loops).items() if isinstance(loop, CPUDispatcher) and name[0] != "_"}
    return {name: [str(signature) for signature in loop.signatures] for name, loop in found.items()}

compile_ahead()
uniform = compiled()
compile_trellis_ahead()
ahead = compiled()
X = torch.randn(700, 96, generator=torch.Generator().manual_seed(0))
H, W = X.T @ X, X[:70].contiguous()
choices = [Choice(bits=b, group_size=g, trellis=t) for b in (2, 5) for g in (32, -1) for t in (False, True)]
polish(W, gptq(W, factorize(H), choices), H)
print(json.dumps([uniform, ahead, compiled()]))
"""


def test_a_layer_compiles_nothing_behind_what_was_compiled_ahead() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    uniform, ahead, after = json.loads(done.stdout)
    assert len(ahead) >= 5
    assert {name for name, signatures in uniform.items() if not signatures} == {"round_segments"}
    assert all(len(signatures) == 1 for signatures in ahead.values()), ahead
    assert after == ahead
