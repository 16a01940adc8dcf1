"""llm-compressor's GPTQ with its defaults: static activation order, damping 0.01, blocks of 128 columns.

Symmetric groups, every linear layer but the head, written as compressed-tensors. Its Triton kernel for the columns
serves every CUDA tensor unless LLMCOMPRESSOR_DISABLE_GPTQ_TRITON or CT_ENFORCE_EAGER is set; how often it was called is
counted, so that the table says which loop ran.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.datasets_types import with_datasets_types
from benchmarks.peers.exchange import Made, Request, measured, serve

KERNEL = "gptq_block_update"


def counted_kernels(counts: dict[str, int]) -> None:
    """Count the calls of every registered kernel of the column loop."""
    from compressed_tensors.utils.impl_backend import ImplBackend

    def counting(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[kernel.__name__] = counts.get(kernel.__name__, 0) + 1
            return kernel(*arguments, **options)

        return call

    registered = ImplBackend._backends.get(KERNEL, [])
    ImplBackend._backends[KERNEL] = [(counting(kernel), fits, order) for kernel, fits, order in registered]


def make(request: Request, tokens: Tensor) -> Made:
    datasets = with_datasets_types()
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    counts: dict[str, int] = {}
    counted_kernels(counts)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=request.bits, type="int", symmetric=True, strategy="group", group_size=request.group_size
        ),
    )
    model = AutoModelForCausalLM.from_pretrained(request.model, dtype="bfloat16")
    rows: Any = [{"input_ids": window, "attention_mask": window * 0 + 1} for window in tokens]
    windows: DataLoader[Any] = DataLoader(rows, batch_size=1)
    with measured(request.device) as spent:
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(request.model),
            dataset=windows,
            recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
        )
    quantized = {
        name: module.weight.detach().to("cpu", copy=True)
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    model.save_pretrained(request.packed, save_compressed=True)
    loop = "".join(f"{name} x {count}" for name, count in counts.items()) or "torch"
    return Made(
        weights=quantized,
        spent=spent,
        settings={"column loop": loop, "datasets": datasets},
        packages=("llmcompressor", "compressed-tensors", "transformers", "torch"),
    )


if __name__ == "__main__":
    serve(make)
