"""Every supported architecture: streamed block by block it is the model that transformers runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import CASES, VOCABULARY, write_tiny
from transformers import AutoModelForCausalLM

from lrpq.model.families import CONVERTED, FAMILIES
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream

LENGTH = 24  # more than the sliding windows of the tiny models


def tokens(num: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 8, (num, LENGTH), generator=torch.Generator().manual_seed(5))


def streamed_logits(stream: BlockStream, ids: torch.Tensor) -> torch.Tensor:
    hidden = stream.embed(ids)
    for index, block in stream.stream(range(stream.num_blocks)):
        hidden = stream.run(block, index, hidden)
    with stream.head() as (tail, head):
        return head(tail(hidden))


def test_every_family_has_a_case() -> None:
    assert {case.architecture for case in CASES.values()} == {*FAMILIES, *CONVERTED}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_streamed_forward_equals_the_models_own(name: str, tmp_path: Path) -> None:
    """Bit for bit in float32, whatever type the source has; experts by transformers' eager loop."""
    folder = write_tiny(tmp_path / "model", name)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if hasattr(own, "set_experts_implementation"):
        own.set_experts_implementation("eager")
    stream = BlockStream(open_source(folder), dtype=torch.float32)
    ids = tokens()
    expected = own(input_ids=ids, use_cache=False).logits
    assert torch.equal(streamed_logits(stream, ids), expected)
    names = [spec.name for spec in stream.specs]
    assert len(set(names)) == len(names) >= 2 * 4
    for spec in stream.specs:
        assert stream.weight(spec).shape == (spec.d_out, spec.d_in)
