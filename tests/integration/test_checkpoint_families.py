"""Every supported architecture: the written checkpoint loads, and is bit for bit what its codes say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CASES, write_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTForCausalLM

from lrpq.allocate.targets import Target
from lrpq.checkpoint.assemble import planned_size, write_checkpoint
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.checkpoint.verify import probe_ids, verify_checkpoint
from lrpq.errors import CheckpointError, ConfigError, ModelError
from lrpq.model.experts import loaded_weight
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.rtn import round_to_nearest

WIDTHS = (2, 3, 4, 5, 6, 8)
EXPERT_BITS = 3
EXPERTS = ("mixtral", "qwen3-moe")


@dataclass(frozen=True)
class Quantized:
    """A tiny model and codes for all of its linear layers but one."""

    source: ModelSource
    specs: tuple[LinearSpec, ...]
    choices: dict[str, Choice]
    load: Callable[[str], QuantizedWeight]

    def write(self, output: Path, **options: Any) -> Any:
        return write_checkpoint(
            self.source,
            output,
            quantized=self.load,
            choices=self.choices,
            specs=self.specs,
            **{"manifest": {}, **options},
        )

    def verify(self, output: Path, **options: Any) -> Any:
        return verify_checkpoint(
            output, self.source, quantized=self.load, choices=self.choices, specs=self.specs, **options
        )


def quantize(folder: Path, *, choose: Callable[[int, LinearSpec], Choice | None] | None = None) -> Quantized:
    source = open_source(folder)
    stream = BlockStream(source, dtype=torch.float32)
    by_name = {spec.name: spec for spec in stream.specs}
    picked = {spec.name: (choose or mixed)(i, spec) for i, spec in enumerate(stream.specs)}
    choices = {name: choice for name, choice in picked.items() if choice is not None}

    def load(name: str) -> QuantizedWeight:
        return round_to_nearest(stream.weight(by_name[name]), choices[name], grid=Grid.SIGNED, name=name)

    return Quantized(source, stream.specs, choices, load)


def mixed(index: int, spec: LinearSpec) -> Choice | None:
    """All widths in turn, one for the experts; the first block's output projection stays dense."""
    if spec.input_site == "o" and spec.block == 0:
        return None
    bits = EXPERT_BITS if spec.routed else WIDTHS[index % len(WIDTHS)]
    return Choice(bits=bits, group_size=32 if spec.d_in % 32 == 0 else -1)


def source_bytes(source: ModelSource) -> int:
    return sum(source.nbytes(name) for name in source.names())


def expected_weights(model: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """Scale times code of every quantized module, by a formula of its own."""
    found = {}
    for name in model.choices:
        codes = model.load(name)
        width = codes.codes.shape[1] // codes.scales.shape[1]
        found[name] = codes.scales.to(dtype).repeat_interleave(width, dim=1) * codes.codes.to(dtype)
    return found


@torch.no_grad()
def logits(loaded: Any) -> Tensor:
    return loaded(probe_ids(320)).logits


@pytest.mark.parametrize("name", CASES)
def test_written_checkpoint_loads_and_computes_what_its_codes_say(name: str, tmp_path: Path) -> None:
    model = quantize(write_tiny(tmp_path / "model", name))
    output = tmp_path / "out"
    size = model.write(output)
    assert size == planned_size(model.source, model.choices, specs=model.specs)
    assert size.total_bytes == sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert size.total_bytes < source_bytes(model.source)
    assert size.quantized_bits + size.metadata_bits < 16 * size.num_quantized_weights
    assert size.num_quantized_weights == sum(s.num_weights for s in model.specs if s.name in model.choices)
    result = model.verify(output)
    assert result.max_abs_difference == 0.0
    assert result.num_modules == len(model.choices)
    assert result.loader == "transformers"

    # said again without the verifier's own code
    stored = StoredCheckpoint(output)
    plain = AutoModelForCausalLM.from_pretrained(output)
    expected = expected_weights(model, torch.float32)
    found = logits(plain)  # layers are unpacked by the first forward
    assert torch.isfinite(found).all()
    for spec in model.specs:
        weight = stored.weight(spec, torch.float32)
        if spec.name in expected:
            assert weight is not None
            assert torch.equal(weight, expected[spec.name])
            if plain.dtype == torch.float32:
                assert torch.equal(loaded_weight(plain, spec.name), weight), spec.name
        else:
            assert weight is None
            original = model.source.read_rows(spec.stored).to(plain.dtype)
            assert torch.equal(loaded_weight(plain, spec.name), original), spec.name


@pytest.mark.parametrize("name", ["gemma3-multimodal", "qwen3-moe"])
def test_everything_left_dense_is_listed(name: str, tmp_path: Path) -> None:
    """Linear layers that are listed nowhere are an error in vLLM: vision tower, routers and head are there."""
    model = quantize(write_tiny(tmp_path / "model", name))
    model.write(tmp_path / "out")
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    plain = AutoModelForCausalLM.from_pretrained(model.source.folder)
    linears = {path for path, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears - set(model.choices) <= set(ignored)
    assert not set(model.choices) & set(ignored)
    tensors = set(model.source.names())
    if name == "gemma3-multimodal":
        assert "vision_tower.encoder.layers.0.self_attn.q_proj.weight" in tensors
        assert "vision_tower.encoder.layers.0.self_attn.q_proj" in ignored
        assert "language_model.model.layers.0.self_attn.o_proj" in ignored
    else:
        assert "model.layers.1.mlp.gate" in ignored


class TestExperts:
    @pytest.mark.parametrize("name", EXPERTS)
    def test_two_choices_are_refused_for_transformers(self, name: str, tmp_path: Path) -> None:
        """It would read all of them by one scheme, and report nothing."""

        def choose(index: int, spec: LinearSpec) -> Choice:
            return Choice(bits=4 if spec.routed and ".experts.0." in spec.name else 8, group_size=-1)

        model = quantize(write_tiny(tmp_path / "model", name), choose=choose)
        with pytest.raises(
            ConfigError, match=r"experts \S+experts\.0\S+ and \S+experts\.1\S+: 4b/channel and 8b/channel"
        ):
            model.write(tmp_path / "out")
        with pytest.raises(ConfigError, match="vllm loads all experts of a block with one choice"):
            model.write(tmp_path / "out", target=Target.VLLM)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", EXPERTS)
    def test_dense_ones_beside_packed_layers_are_refused_for_transformers(self, name: str, tmp_path: Path) -> None:
        """Their conversion finds nothing to merge and the load fails; vLLM runs them."""

        def choose(index: int, spec: LinearSpec) -> Choice | None:
            return None if spec.routed else Choice(bits=4, group_size=32)

        model = quantize(write_tiny(tmp_path / "model", name), choose=choose)
        with pytest.raises(ConfigError, match=r"expert \S+: left dense, but transformers loads no dense experts"):
            model.write(tmp_path / "out")
        model.write(tmp_path / "out", target=Target.VLLM)
        assert model.verify(tmp_path / "out").loader is None
        ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
        assert any(pattern.startswith("re:^") and "experts" in pattern for pattern in ignored)
        with pytest.raises(RuntimeError, match="conversion"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def test_a_choice_a_block_is_written_for_vllm_and_its_codes_compared(self, tmp_path: Path) -> None:
        def choose(index: int, spec: LinearSpec) -> Choice:
            return Choice(bits=4 if spec.block == 0 else 8, group_size=32)

        model = quantize(write_tiny(tmp_path / "model", "mixtral"), choose=choose)
        with pytest.raises(ConfigError, match="--target vllm"):
            model.write(tmp_path / "out")
        model.write(tmp_path / "out", target=Target.VLLM)
        result = model.verify(tmp_path / "out")
        assert (result.loader, result.num_tokens, result.max_abs_difference) == (None, 0, None)
        stored = StoredCheckpoint(tmp_path / "out")
        expected = expected_weights(model, torch.float32)
        for spec in model.specs:
            weight = stored.weight(spec, torch.float32)
            assert weight is not None
            assert torch.equal(weight, expected[spec.name])
        path = tmp_path / "out/model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight_packed"][0, 0] ^= 1
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"experts\.3\.w3\.weight_packed in .* 1 of \d+ values differ"):
            model.verify(tmp_path / "out")

    def test_the_tensors_are_those_of_the_original(self, tmp_path: Path) -> None:
        """Gate and up projection are one module of two tensors on disk; the loaded model is bfloat16."""
        model = quantize(write_tiny(tmp_path / "model", "mixtral"))
        model.write(tmp_path / "out")
        tensors = load_file(tmp_path / "out/model.safetensors")
        stem = "model.layers.1.block_sparse_moe.experts.2"
        codes = model.load("model.layers.1.mlp.experts.2.gate_up_proj")
        assert torch.equal(tensors[f"{stem}.w1.weight_scale"], codes.scales[:96])
        assert torch.equal(tensors[f"{stem}.w3.weight_scale"], codes.scales[96:])
        assert tensors[f"{stem}.w2.weight_shape"].tolist() == [64, 96]
        # transformers gives packed experts the type of their scales, whatever the rest of the model has
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


class TestGPT2:
    @torch.no_grad()
    def test_output_is_an_opt_model_that_computes_what_gpt2_does(self, tmp_path: Path) -> None:
        model = quantize(write_tiny(tmp_path / "model", "gpt2"))
        model.write(tmp_path / "out")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(loaded) is OPTForCausalLM
        gpt2 = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        width = gpt2.config.n_embd
        layers = {"self_attn.out_proj": "attn.c_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
        for name, weight in expected_weights(model, torch.float32).items():
            block, layer = name.removeprefix("model.decoder.layers.").split(".", 1)
            if layer in layers:
                gpt2.get_submodule(f"transformer.h.{block}.{layers[layer]}").weight.copy_(weight.t())
            else:
                start = width * ("q_proj", "k_proj", "v_proj").index(layer.removeprefix("self_attn."))
                fused = gpt2.get_submodule(f"transformer.h.{block}.attn.c_attn").weight
                fused[:, start : start + width].copy_(weight.t())
        # measured: no difference at all; another processor may order a sum otherwise
        assert torch.allclose(logits(loaded), logits(gpt2), rtol=0, atol=1e-5)

    def test_names_without_the_models_prefix_and_stored_masks(self, tmp_path: Path) -> None:
        """The hub's first GPT-2 files."""
        folder = write_tiny(tmp_path / "model", "gpt2")
        tensors = load_file(folder / "model.safetensors")
        old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        old["h.0.attn.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
        save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
        model = quantize(folder)
        model.write(tmp_path / "out")
        assert model.verify(tmp_path / "out").max_abs_difference == 0.0


def test_buffers_of_old_checkpoints_are_carried_over(tmp_path: Path) -> None:
    """Integers and booleans too, though no loader reads them."""
    folder = write_tiny(tmp_path / "model", "gpt-neox")
    path = folder / "model.safetensors"
    buffers = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.rand(4),
        "gpt_neox.position_ids": torch.arange(8),
    }
    save_file({**load_file(path), **buffers}, path, metadata={"format": "pt"})
    model = quantize(folder)
    model.write(tmp_path / "out", max_shard_bytes=50_000)
    assert model.verify(tmp_path / "out").max_abs_difference == 0.0
    found = {k: v for part in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(part).items()}
    for name, values in buffers.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values)


def test_modules_of_several_tensors_need_their_spec(tmp_path: Path) -> None:
    model = quantize(write_tiny(tmp_path / "model", "mixtral"))
    with pytest.raises(ModelError, match=r"has no weight in .* \(no tensor model\.layers\.0"):
        write_checkpoint(model.source, tmp_path / "out", quantized=model.load, choices=model.choices, manifest={})
