"""Does GPTQModel load a checkpoint of ours, and give the logits of the dense one?

    python -m benchmarks.load_gptq GPTQ_DIR DENSE_DIR

Both of the same codes: `lrpq compress --format gptq --keep '*=4'`, then `lrpq reallocate --format dense --keep '*=4'`.
Needs the package gptqmodel, which wants an environment of its own; nothing of lrpq is imported.
"""

from __future__ import annotations

import argparse

import torch
from gptqmodel import BACKEND, GPTQModel
from transformers import AutoModelForCausalLM

TOKENS = 32
STRIDE = 7919


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gptq")
    parser.add_argument("dense")
    arguments = parser.parse_args()
    dense = AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=torch.bfloat16).eval()
    ids = (torch.arange(1, TOKENS + 1) * STRIDE % dense.config.get_text_config().vocab_size)[None]
    expected = dense(ids).logits
    packed = GPTQModel.load(arguments.gptq, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.bfloat16)
    difference = (packed.model(ids).logits.float() - expected.float()).abs().max()
    print(f"largest difference of a logit: {difference:g} (largest logit {expected.abs().max():g})")


if __name__ == "__main__":
    main()
