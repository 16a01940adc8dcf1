"""Every supported architecture: streamed block by block it is the model that transformers runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CASES, VOCABULARY, write_tiny
from transformers import AutoModelForCausalLM

from lrpq.errors import ModelError
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


@pytest.mark.parametrize("name", sorted(set(CASES) - {"opt-post-norm"}))  # there it is the sum that is normed
@torch.no_grad()
def test_units_say_whether_their_output_is_added_as_it_is(name: str, tmp_path: Path) -> None:
    """What a unit's last layer says more comes out of the block as it is, nothing behind it saying anything; behind
    a norm it would not."""
    stream = BlockStream(open_source(write_tiny(tmp_path / "model", name)), dtype=torch.float32)
    hidden = stream.embed(tokens())
    more = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(1))
    for index, block in stream.stream(range(1)):
        parts = dict(block.named_modules())
        for unit in stream.family.units:
            silent = parts["mlp" if "mlp" in parts else "fc2"]
            hooks = []
            if not unit.path.startswith("mlp"):
                hooks.append(silent.register_forward_hook(lambda *call: _zeros(call[-1])))
            before = stream.run(block, index, hidden)
            hooks.append(parts[unit.last].register_forward_hook(lambda *call: call[-1] + more))
            difference = stream.run(block, index, hidden) - before
            for hook in hooks:
                hook.remove()
            assert torch.allclose(difference, more.expand_as(difference), atol=1e-3) == unit.added, unit.path


def _zeros(output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def rewritten(folder: Path, change: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_a_stream_can_be_embedded_again(name: str, tmp_path: Path) -> None:
    """Computed buffers (Gemma's embedding scale) outlive the weights beside them."""
    stream = BlockStream(open_source(write_tiny(tmp_path / "model", name)), dtype=torch.float32)
    first = streamed_logits(stream, tokens())
    assert torch.equal(streamed_logits(stream, tokens()), first)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"vocab_size": 300}, r"tensor model\.embed_tokens\.weight: shape \(320, 64\), config\.json asks for"),
        ("qwen3", {"head_dim": 16}, r"tensor model\.layers\.0\.self_attn\.q_proj\.weight: shape \(96, 64\)"),
        ("mixtral", {"num_local_experts": 3}, r"tensor model\.layers\.0\.\w+\.gate\.weight: shape \(4, 64\)"),
        ("qwen3-moe", {"moe_intermediate_size": 16}, r"experts\.0\.gate_proj\.weight: shape \(32, 64\).*in 2 parts"),
        ("opt", {"num_hidden_layers": 0}, "without decoder blocks"),
        ("llama", {"num_hidden_layers": 3}, r"tensor model\.layers\.2\.\S+ is missing"),
    ],
)
def test_a_configuration_of_other_shapes_is_refused_before_any_tensor_is_read(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = rewritten(write_tiny(tmp_path / "model", name), change)
    with pytest.raises(ModelError, match=message):
        BlockStream(open_source(folder), dtype=torch.float32)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "prefix"),
    [("llama", "model."), ("mixtral", "model."), ("qwen3-moe", "model."), ("gpt2", "transformer."), ("opt", "model.")],
)
def test_tensors_without_the_models_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    """As some checkpoints on the hub are: transformers adds it while loading."""
    folder = write_tiny(tmp_path / "model", name)
    expected = streamed_logits(BlockStream(open_source(folder), dtype=torch.float32), tokens())
    path = folder / "model.safetensors"
    save_file({k.removeprefix(prefix): v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    assert torch.equal(streamed_logits(BlockStream(open_source(folder), dtype=torch.float32), tokens()), expected)


@pytest.mark.parametrize("field", ["scale_attn_by_inverse_layer_idx", "add_cross_attention"])
def test_gpt2_that_opt_does_not_compute_is_refused(field: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"GPT-2 with {field}=True"):
        open_source(rewritten(write_tiny(tmp_path / "model", "gpt2"), {field: True}))
