"""AutoRound: rounding and scale bounds of one block at a time, tuned by signed gradients. Symmetric groups.

Defaults are the package's (200 iterations, learning rate 1/iterations, 8 windows a step, torch.compile); options
``iterations``, ``batch_size``, ``lr`` and ``torch_compile`` (0 or 1) replace them. The package's own light recipe is 50
iterations with lr 0.005.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.datasets_types import with_datasets_types
from benchmarks.peers.exchange import Made, Request, measured, serve

OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "iterations": ("iters", int),
    "batch_size": ("batch_size", int),
    "lr": ("lr", float),
    "torch_compile": ("enable_torch_compile", lambda text: bool(int(text))),
}
"""Name -> the package's argument and how it is read."""
FORMAT = "llm_compressor"
"""compressed-tensors: the one of its formats that stores no zero points for symmetric codes."""


def options_of(request: Request) -> dict[str, Any]:
    """The package's arguments for the request's options."""
    return {OPTIONS[name][0]: OPTIONS[name][1](text) for name, text in request.options.items() if name in OPTIONS}


def give_windows(tokens: Tensor) -> str:
    """Let the package's loader give these windows, whatever data set it is asked for; a name to ask with.

    Its other way in, a list of tensors, is closed to AutoScheme and masks the last token of every window.
    """
    from auto_round import calib_dataset
    from auto_round.auto_scheme import delta_loss

    def batches(
        tokenizer: Any, seqlen: int, dataset_name: str = "", seed: int = 0, bs: int = 8, nsamples: int = 512
    ) -> list[dict[str, Tensor]]:
        return [{"input_ids": part, "attention_mask": part * 0 + 1} for part in tokens[:nsamples].split(bs)]

    calib_dataset.get_dataloader = delta_loss.get_dataloader = batches
    return "the-windows-of-the-comparison"


def tuned(request: Request, tokens: Tensor, scheme: Any, settings: dict[str, str]) -> Made:
    """Quantize under a scheme and write the packed checkpoint."""
    from auto_round import AutoRound

    options = options_of(request)
    model = AutoModelForCausalLM.from_pretrained(request.model, dtype="bfloat16")
    run = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(request.model),
        scheme=scheme,
        dataset=give_windows(tokens),
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
