"""lrpq and its control in the benchmark's own environment, by the methods of ``lrpq compare``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.exchange import Made, Request, measured, serve
from lrpq.checkpoint.assemble import write_checkpoint
from lrpq.compare.methods import METHODS
from lrpq.compare.prepared import Prepared
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Codes, Gathered, Workbench
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from tasks.resources import cut_of

SCALE_BITS = 16


def codes_of(request: Request, bench: Workbench) -> Codes:
    """Codes by the method that the request names."""
    recipe = METHODS[request.peer].recipe
    if request.peer == "control":
        choice = Choice(bits=request.bits, group_size=request.group_size)
        return bench.codes({spec.name: choice for spec in bench.stream().specs}, recipe, Gathered())
    budget = request.bits + SCALE_BITS / request.group_size
    prepared = Prepared(bench, [recipe], [budget])
    return prepared.bench.codes(prepared.plan(recipe.allocation, budget).choices, recipe, prepared.gathered)


def make(request: Request, tokens: Tensor) -> Made:
    source = ModelSource(Path(request.model))
    cut = cut_of(
        device=request.device,
        num_windows=len(tokens),
        length=tokens.shape[1],
        hidden=source.config.get_text_config().hidden_size,
    )
    terms = Terms(
        group_sizes=(request.group_size, -1),
        seed=request.seed,
        device=request.device,
        shards=cut.shards,
        micro_batch=cut.micro_batch,
    )
    with measured(request.device) as spent:
        codes = codes_of(request, Workbench(source, tokens, terms))
    choices = {name: weight.choice for name, weight in codes.items()}
    write_checkpoint(source, request.packed, quantized=codes.get, choices=choices, manifest={})
    return Made(
        weights={name: weight.dequantize(torch.bfloat16) for name, weight in codes.items()},
        spent=spent,
        settings={"method": METHODS[request.peer].source},
        packages=("transformers", "torch"),
    )


if __name__ == "__main__":
    serve(make)
