"""GPTQModel with its defaults: groups kept whole while their order follows activations, damping 0.05, GPTQ's layout.

That layout stores zero points of symmetric codes and the group of every column; both count.
"""

from __future__ import annotations

import os

from torch import Tensor

from benchmarks.peers.exchange import Made, Request, measured, serve

WORKERS = "GPTQMODEL_CPU_WORKERS"


def make(request: Request, tokens: Tensor) -> Made:
    os.environ.setdefault(WORKERS, "4")  # its default on two cores is one, which waits for itself
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    config = QuantizeConfig(bits=request.bits, group_size=request.group_size, device=request.device)
    run = GPTQModel.load(request.model, config, dtype="bfloat16")
    windows = [{"input_ids": window.tolist(), "attention_mask": [1] * len(window)} for window in tokens]
    with measured(request.device) as spent:
        run.quantize(windows, batch_size=1)
    run.save(str(request.packed))
    # read back, since saving may empty the layers: what is scored is what was stored
    read = GPTQModel.load(str(request.packed), device=request.device, dtype="bfloat16", backend="torch")
    quantized = {
        name: module.dequantize_weight().T.detach().to("cpu", copy=True)  # [d_in, d_out] in this package
        for name, module in read.model.named_modules()
        if isinstance(module, BaseQuantLinear)
    }
    return Made(
        weights=quantized,
        spent=spent,
        settings={"damping": f"{config.damp_percent:g}", "group aware": str(config.act_group_aware)},
        packages=("gptqmodel", "transformers", "torch"),
    )


if __name__ == "__main__":
    serve(make)
