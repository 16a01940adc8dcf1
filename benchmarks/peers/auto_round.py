"""AutoRound: rounding and scale bounds of one block at a time, tuned by signed gradients. Symmetric groups.

Defaults are the package's (200 iterations, learning rate 1/iterations, 8 windows a step); options ``iterations``,
``batch_size`` and ``lr`` replace them. The package's own light recipe is 50 iterations with lr 0.005.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.datasets_types import with_datasets_types
from benchmarks.peers.exchange import Made, Request, measured, serve

OPTIONS = {"iterations": int, "batch_size": int, "lr": float}
FORMAT = "llm_compressor"
"""compressed-tensors: the one of its formats that stores no zero points for symmetric codes."""


def options_of(request: Request) -> dict[str, Any]:
    """The package's arguments for the request's options."""
    found = {name: kind(request.options[name]) for name, kind in OPTIONS.items() if name in request.options}
    if "iterations" in found:
        found["iters"] = found.pop("iterations")
    return found


def tuned(request: Request, tokens: Tensor, scheme: Any, settings: dict[str, str]) -> Made:
    """Quantize under a scheme and write the packed checkpoint."""
    from auto_round import AutoRound

    options = options_of(request)
    model = AutoModelForCausalLM.from_pretrained(request.model, dtype="bfloat16")
    run = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(request.model),
        scheme=scheme,
        dataset=[window[None] for window in tokens],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        seed=request.seed,
        device_map=request.device,
        **options,
    )
    with measured(request.device) as spent:
        model, _ = run.quantize()
    quantized = {
        name: module.weight.detach().to("cpu", copy=True)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and getattr(module, "bits", 16) < 16
    }
    run.save_quantized(str(request.packed), format=FORMAT, inplace=True)
    said = {name: f"{value:g}" for name, value in options.items()} or {"tuning": "defaults"}
    return Made(
        weights=quantized,
        spent=spent,
        settings=said | settings,
        packages=("auto-round", "transformers", "torch"),
    )


def make(request: Request, tokens: Tensor) -> Made:
    datasets = with_datasets_types()
    from auto_round import QuantizationScheme

    scheme = QuantizationScheme(bits=request.bits, group_size=request.group_size, sym=True, data_type="int")
    return tuned(request, tokens, scheme, {"datasets": datasets})


if __name__ == "__main__":
    serve(make)
