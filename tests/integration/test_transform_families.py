"""Every architecture: a transformed folder loads with plain transformers and computes what the original computes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CASES, VOCABULARY, write_tiny, write_tokenizer
from transformers import AutoModelForCausalLM

from lrpq.errors import ModelError
from lrpq.model.families import FAMILIES
from lrpq.model.layers import Choice
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.rtn import round_to_nearest
from lrpq.transform.awq import search_awq
from lrpq.transform.graph import GRAPHS, rotatable_graph, smoothable_graph
from lrpq.transform.orthogonal import RotationKind
from lrpq.transform.rotation import RotationScope, rotate
from lrpq.transform.smoothing import Smoothing, smooth
from lrpq.transform.smoothquant import search_smoothquant

CHOICE = Choice(bits=3, group_size=32)
TOLERANCE = 1e-5  # of the largest logit, in float32
GRAPH_OF = {
    n: GRAPHS[c.architecture] for n, c in CASES.items() if c.dtype is torch.float32 and c.architecture in GRAPHS
}
ROTATED = [name for name, graph in GRAPH_OF.items() if graph.no_rotation is None]
SMOOTHED = [name for name, graph in GRAPH_OF.items() if graph.no_smoothing is None]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens() -> torch.Tensor:
    """More than the sliding windows of the tiny models."""
    return torch.randint(3, VOCABULARY - 8, (2, 24), generator=seeded(5))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(input_ids=tokens(), use_cache=False).logits


def difference(folder: Path, original: Path) -> float:
    """Largest difference of logits, as a share of the largest logit."""
    expected = logits(original)
    return float((logits(folder) - expected).abs().max() / expected.abs().max())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def searched(folder: Path, *, how: str) -> Smoothing:
    stream = BlockStream(open_source(folder), dtype=torch.float32)
    if how == "awq":
        return search_awq(stream, tokens(), CHOICE, alphas=(0.5,)).smoothing
    return search_smoothquant(stream, tokens(), CHOICE, alphas=(0.5,)).smoothing


def test_every_family_is_described() -> None:
    assert set(GRAPHS) == set(FAMILIES)
    assert {CASES[n].architecture for n in ROTATED} == {
        *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"),
        *("MixtralForCausalLM", "Qwen3MoeForCausalLM"),
    }
    assert {CASES[n].architecture for n in SMOOTHED} == {
        *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"),
        *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    }


@pytest.mark.parametrize("scope", RotationScope)
@pytest.mark.parametrize("name", ROTATED)
def test_rotated_model_computes_the_same(name: str, scope: RotationScope, tmp_path: Path) -> None:
    original = write_tiny(tmp_path / "model", name)
    report = rotate(open_source(original), tmp_path / "rotated", generator=seeded(), scope=scope)
    assert difference(tmp_path / "rotated", original) < TOLERANCE
    before, after = tensors(original), tensors(tmp_path / "rotated")
    untied = CASES[name].options.get("tie_word_embeddings", False)
    assert set(after) - set(before) == set(report.added) == ({"lm_head.weight"} if untied else set())
    changed = {key for key, value in after.items() if key not in before or not torch.equal(value, before[key])}
    assert changed == set(report.folded)
    gains = [key for key in after if "layernorm" in key or key == "model.norm.weight"]
    assert len(gains) == 2 * 2 + 1
    assert all(bool((after[key] == 1).all()) for key in gains)
    written = sum(value.nbytes for value in after.values())
    assert (report.source_bytes, report.written_bytes) == (sum(value.nbytes for value in before.values()), written)
    assert report.num_copied + len(report.folded) == len(after)
    assert json.loads((tmp_path / "rotated/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("kind", RotationKind)
def test_rotation_changes_what_is_rounded(kind: RotationKind, tmp_path: Path) -> None:
    """The transform is no change of names: the rotated model, rounded, computes something else than the original."""
    original = write_tiny(tmp_path / "model", "llama")
    rotate(open_source(original), tmp_path / "rotated", generator=seeded(), kind=kind)
    key = "model.layers.0.mlp.gate_proj.weight"
    codes = [round_to_nearest(tensors(folder)[key], CHOICE).codes for folder in (original, tmp_path / "rotated")]
    assert float((codes[0] != codes[1]).float().mean()) > 0.5

    def rounded(folder: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            for module in model.model.layers.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(round_to_nearest(module.weight, CHOICE).dequantize())
            return model(input_ids=tokens(), use_cache=False).logits

    expected = rounded(original)
    assert float((rounded(tmp_path / "rotated") - expected).abs().max() / expected.abs().max()) > 0.01


@pytest.mark.parametrize("how", ["awq", "smoothquant"])
@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothed_model_computes_the_same(name: str, how: str, tmp_path: Path) -> None:
    original = write_tiny(tmp_path / "model", name)
    smoothing = searched(original, how=how)
    assert smoothing.scales
    report = smooth(open_source(original), tmp_path / "smoothed", smoothing)
    assert difference(tmp_path / "smoothed", original) < TOLERANCE
    before, after = tensors(original), tensors(tmp_path / "smoothed")
    assert set(before) == set(after)
    assert report.written_bytes == report.source_bytes
    assert {key for key in after if not torch.equal(after[key], before[key])} == set(report.folded)
    feeds = {f"{scale.pair.feed}.weight" for scale in smoothing.scales}
    if "multimodal" not in name:  # whose names on disk are not the model's
        assert feeds <= set(report.folded)


@pytest.mark.parametrize(
    ("name", "architecture", "reason"),
    [
        ("opt", "OPTForCausalLM", "LayerNorm subtracts the mean"),
        ("gpt2", "OPTForCausalLM", "LayerNorm subtracts the mean"),
        ("gpt-neox", "GPTNeoXForCausalLM", "LayerNorm subtracts the mean"),
        ("gemma2", "Gemma2ForCausalLM", "norms behind attention and MLP"),
        ("gemma3", "Gemma3ForCausalLM", "norms behind attention and MLP"),
        ("gemma3-multimodal", "Gemma3ForConditionalGeneration", "norms behind attention and MLP"),
    ],
)
def test_rotation_is_refused_by_name(name: str, architecture: str, reason: str, tmp_path: Path) -> None:
    source = open_source(write_tiny(tmp_path / "model", name))
    with pytest.raises(ModelError, match=f"{architecture} cannot be rotated: .*{reason}"):
        rotate(source, tmp_path / "rotated", generator=seeded())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("opt", "no gate"), ("gpt-neox", "no gate"), ("mixtral", "tokens that the router"), ("qwen3-moe", "router")],
)
@pytest.mark.parametrize("search", [search_awq, search_smoothquant])
def test_smoothing_is_refused_by_name(name: str, reason: str, search: Any, tmp_path: Path) -> None:
    source = open_source(write_tiny(tmp_path / "model", name))
    with pytest.raises(ModelError, match=f"{CASES[name].architecture} cannot be smoothed: .*{reason}"):
        search(BlockStream(source, dtype=torch.float32), tokens(), CHOICE)
    with pytest.raises(ModelError, match="cannot be smoothed"):
        smooth(source, tmp_path / "smoothed", Smoothing(scales=(), skipped=()))
    with pytest.raises(ModelError, match="cannot be smoothed"):
        smoothable_graph(source)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["ElseForCausalLM"]}))
    with pytest.raises(ModelError, match="unsupported architecture: ElseForCausalLM"):
        rotatable_graph(open_source(folder))


@pytest.mark.parametrize("on_disk", ["embedding", "head", "both"])
def test_a_tied_head_is_untied_wherever_its_tensor_lies(on_disk: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "qwen2")
    path = folder / "model.safetensors"
    stored = load_file(path)
    embedding = stored["model.embed_tokens.weight"]
    if on_disk != "embedding":
        stored["lm_head.weight"] = embedding.clone()
    if on_disk == "head":
        del stored["model.embed_tokens.weight"]
    save_file(stored, path, metadata={"format": "pt"})
    rotate(open_source(folder), tmp_path / "rotated", generator=seeded())
    assert difference(tmp_path / "rotated", folder) < TOLERANCE
    after = tensors(tmp_path / "rotated")
    assert set(after) == set(stored) | {"lm_head.weight", "model.embed_tokens.weight"}
    assert not torch.allclose(after["lm_head.weight"], after["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rotated")
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2"])
def test_tensors_without_the_models_prefix(name: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", name)
    path = folder / "model.safetensors"
    save_file({k.removeprefix("model."): v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    rotate(open_source(folder), tmp_path / "rotated", generator=seeded())
    assert difference(tmp_path / "rotated", folder) < TOLERANCE


def test_transforms_follow_one_another(tmp_path: Path) -> None:
    """A transformed folder is a model as any: it can be smoothed, and rotated again."""
    original = write_tiny(tmp_path / "model", "llama-rope-scaled")
    write_tokenizer(original)
    turn = partial(rotate, generator=seeded())
    turn(open_source(original), tmp_path / "once")
    smooth(open_source(tmp_path / "once"), tmp_path / "smooth", searched(tmp_path / "once", how="awq"))
    report = turn(open_source(tmp_path / "smooth"), tmp_path / "twice")
    assert report.added == ()
    assert difference(tmp_path / "twice", original) < 2 * TOLERANCE
    assert (tmp_path / "twice/tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()
