"""The count of profiling's passes is that of the model's own products."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import write_llama
from transformers import AutoModelForCausalLM

from benchmarks.profile_passes import measure
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream


def test_a_forward_pass_and_the_sums_are_counted_as_they_are(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m")
    tokens = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    found = measure(folder, tokens)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    specs = BlockStream(open_source(folder), dtype=torch.float32).specs
    weights = sum(spec.num_weights for spec in specs) + config.vocab_size * config.hidden_size
    attention = 2 * config.hidden_size * 16 * config.num_hidden_layers
    assert found["forward"].model == 2 * tokens.numel() * (weights + attention)
    # one Hessian a site and moments of every layer's outputs, over all tokens
    inputs = {(spec.block, spec.input_site): spec.d_in for spec in specs}
    least = tokens.numel() * 2 * sum(width**2 for width in inputs.values())
    assert found["fisher"].apart > least
    assert found["blend (the default)"].apart == found["fisher"].apart
    assert (
        1 < found["fisher"].model / found["forward"].model < found["blend (the default)"].model / found["forward"].model
    )
