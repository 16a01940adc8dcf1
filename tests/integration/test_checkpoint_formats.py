"""The same codes as compressed-tensors, as dense weights and as GPTQ: what is on disk, what loads, what reads back."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint_families import Quantized, expected_weights, logits, mixed, quantize
from tiny_models import write_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrpq.checkpoint.assemble import planned_size
from lrpq.checkpoint.formats import CheckpointFormat, storage_bits
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.errors import CheckpointError, ConfigError
from lrpq.model.experts import loaded_weight
from lrpq.model.layers import Choice, LinearSpec
from lrpq.quant.grid import QuantizedWeight

GPTQ_BITS = {"qkv": 3, "o": 8, "gate_up": 2, "up": 2, "down": 4}
DENSE_CASES = ("llama", "llama-fp16", "qwen3-bf16-sharded", "gemma3-multimodal", "mixtral", "gpt2")
GPTQ_CASES = ("llama", "gemma3-multimodal", "phi3", "gpt2", "qwen3-moe")


def with_gptq_widths(index: int, spec: LinearSpec) -> Choice | None:
    """Other widths in every block, groups that differ, one layer dense."""
    if spec.input_site == "o" and spec.block == 0:
        return None
    if spec.routed:
        return Choice(bits=4, group_size=32)
    bits = GPTQ_BITS[spec.input_site]
    if spec.block == 1:
        bits = {3: 4, 8: 3, 2: 8, 4: 2}[bits]
    return Choice(bits=bits, group_size=-1 if spec.input_site == "down" else 32)


def any_experts(index: int, spec: LinearSpec) -> Choice | None:
    """Experts of several widths and dense ones: only dense weights can be so."""
    if not spec.routed:
        return mixed(index, spec)
    return None if index % 5 == 0 else Choice(bits=2 + index % 4, group_size=32)


def files_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def verify(model: Quantized, output: Path, format: CheckpointFormat) -> Any:
    return model.verify(output, format=format)


@pytest.mark.parametrize("format", CheckpointFormat)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_size_is_planned_to_the_byte_and_counts_what_a_module_takes(
    name: str, format: CheckpointFormat, tmp_path: Path
) -> None:
    model = quantize(write_tiny(tmp_path / "model", name), choose=with_gptq_widths)
    size = model.write(tmp_path / "out", format=format)
    assert size == planned_size(model.source, model.choices, specs=model.specs, format=format)
    assert size.total_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    by_name = {spec.name: spec for spec in model.specs}
    assert size.quantized_bits == sum(storage_bits(by_name[n], c, format) for n, c in model.choices.items())
    if format is CheckpointFormat.DENSE:
        assert size.average_bits == 16
        assert size.metadata_bits == 0


class TestDense:
    @pytest.mark.parametrize("name", DENSE_CASES)
    def test_loads_as_any_model_and_computes_what_the_codes_say(self, name: str, tmp_path: Path) -> None:
        model = quantize(write_tiny(tmp_path / "model", name), choose=any_experts)
        output = tmp_path / "out"
        model.write(output, format=CheckpointFormat.DENSE)
        assert "quantization_config" not in json.loads((output / "config.json").read_text())
        stored, source = files_of(output), model.source
        assert set(stored) == set(source.names())
        expected = expected_weights(model, torch.float32)
        replaced = {tensor for spec in model.specs if spec.name in expected for tensor in spec.stored}
        for tensor in source.names():
            half = source.dtype(tensor) if source.dtype(tensor).itemsize == 2 else torch.bfloat16
            assert stored[tensor].dtype == (half if tensor in replaced else source.dtype(tensor))
        result = verify(model, output, CheckpointFormat.DENSE)
        assert (result.loader, result.max_abs_difference) == ("transformers", 0.0)
        assert result.num_copied == len(source.names()) - len(replaced)

        plain = AutoModelForCausalLM.from_pretrained(output)
        assert plain.dtype == source.dtype(model.specs[0].stored[0])
        reader = StoredCheckpoint(output)
        assert reader.format is CheckpointFormat.DENSE
        assert reader.modules() == []
        for spec in model.specs:
            weight = reader.weight(spec, torch.float32)
            assert torch.equal(loaded_weight(plain, spec.name).float(), weight)
            if spec.name in expected:
                half = stored[spec.stored[0]].dtype
                codes = model.load(spec.name)
                assert torch.equal(
                    weight,
                    (
                        codes.scales.to(half).repeat_interleave(spec.d_in // codes.scales.shape[1], dim=1)
                        * codes.codes.to(half)
                    ).float(),
                )

    def test_is_what_the_packed_one_computes_in_bfloat16(self, tmp_path: Path) -> None:
        model = quantize(write_tiny(tmp_path / "model", "qwen3-bf16-sharded"))
        model.write(tmp_path / "packed")
        model.write(tmp_path / "dense", format=CheckpointFormat.DENSE)
        packed, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("packed", "dense"))
        assert torch.equal(logits(packed), logits(dense))

    def test_a_flipped_bit_is_found(self, tmp_path: Path) -> None:
        model = quantize(write_tiny(tmp_path / "model", "llama"))
        model.write(tmp_path / "out", format=CheckpointFormat.DENSE)
        path = tmp_path / "out/model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.0.mlp.up_proj.weight"][3, 3] += 0.5
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj: 1 of 6144 values differ"):
            verify(model, tmp_path / "out", CheckpointFormat.DENSE)

    def test_a_model_that_is_no_checkpoint_is_not_taken_for_one(self, tmp_path: Path) -> None:
        folder = write_tiny(tmp_path / "model", "llama")
        with pytest.raises(CheckpointError, match="not the configuration of a packed checkpoint"):
            StoredCheckpoint(folder)

    def test_packed_tensors_without_their_description_are_not_dense(self, tmp_path: Path) -> None:
        model = quantize(write_tiny(tmp_path / "model", "llama"))
        model.write(tmp_path / "out")
        path = tmp_path / "out/config.json"
        config = json.loads(path.read_text())
        del config["quantization_config"]
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"weight_packed has codes that config\.json does not describe"):
            StoredCheckpoint(tmp_path / "out")


def stream_of_codes(words: Tensor, bits: int) -> np.ndarray[Any, Any]:
    """Unsigned codes [n, ...] from int32 words [n * bits / 32, ...]: one stream of bits, lowest first."""
    raw = words.numpy().view(np.uint32)
    as_bits = (raw[:, None] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
    by_code = as_bits.reshape(-1, bits, raw.shape[1])
    return (by_code << np.arange(bits)[None, :, None]).sum(axis=1)


def gptq_weight(tensors: dict[str, Tensor], module: str, bits: int) -> np.ndarray[Any, Any]:
    """Weight [d_out, d_in] by the format's definition: scale[g] * (q - (zero[g] + 1)), in float32."""
    codes = stream_of_codes(tensors[f"{module}.qweight"], bits)
    zeros = stream_of_codes(tensors[f"{module}.qzeros"].T.contiguous(), bits).T + 1
    scales = tensors[f"{module}.scales"].float().numpy()
    group = tensors[f"{module}.g_idx"].numpy()
    assert codes.shape == (len(group), scales.shape[1])
    return (scales[group] * (codes - zeros[group]).astype(np.float32)).T


def rule_of(config: dict[str, Any], module: str) -> tuple[int, int] | None:
    """Bits and group size as GPTQModel and vLLM look them up: the first pattern that matches; None is skipped."""
    for key, override in config["dynamic"].items():
        if re.match(key[2:], module):
            return None if key.startswith("-:") else (override["bits"], override["group_size"])
    return config["bits"], config["group_size"]


class TestGPTQ:
    @pytest.mark.parametrize("name", GPTQ_CASES)
    def test_an_independent_unpacker_finds_the_weights(self, name: str, tmp_path: Path) -> None:
        model = quantize(write_tiny(tmp_path / "model", name), choose=with_gptq_widths)
        output = tmp_path / "out"
        model.write(output, format=CheckpointFormat.GPTQ)
        result = verify(model, output, CheckpointFormat.GPTQ)
        assert (result.loader, result.num_modules, result.max_abs_difference) == (None, len(model.choices), None)
        config = json.loads((output / "config.json").read_text())["quantization_config"]
        assert (config["quant_method"], config["checkpoint_format"]) == ("gptq", "gptq")
        assert config["sym"] is True
        assert config["desc_act"] is False
        tensors, reader = files_of(output), StoredCheckpoint(output)
        assert not {tensor.dtype for n, tensor in tensors.items() if n.endswith(".scales")} - {torch.float16}
        expected = expected_weights(model, torch.float32)
        for spec in model.specs:
            weight = reader.weight(spec, torch.float32)
            modules = [tensor.removesuffix(".weight") for tensor in spec.stored]
            rules = {rule_of(config, module) for module in modules}
            if not spec.routed:
                rules.add(rule_of(config, spec.name))
            if spec.name not in expected:
                assert weight is None
                assert rules == {None}
                continue
            choice = model.choices[spec.name]
            assert rules == {(choice.bits, choice.group_size)}
            found = np.concatenate([gptq_weight(tensors, module, choice.bits) for module in modules])
            assert np.array_equal(found, expected[spec.name].numpy())
            assert torch.equal(weight, expected[spec.name])
        assert rule_of(config, "lm_head") is None

    def test_names_that_vllm_fuses_have_the_rule_of_their_parts(self, tmp_path: Path) -> None:
        model = quantize(write_tiny(tmp_path / "model", "qwen3-moe"), choose=with_gptq_widths)
        model.write(tmp_path / "out", format=CheckpointFormat.GPTQ)
        config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
        assert rule_of(config, "model.layers.0.self_attn.qkv_proj") == (3, 32)
        assert rule_of(config, "model.layers.1.self_attn.qkv_proj") == (4, 32)
        assert rule_of(config, "model.layers.0.mlp.gate_up_proj") == (2, 32)
        assert rule_of(config, "model.layers.1.mlp.experts") == (4, 32)
        assert rule_of(config, "model.layers.1.mlp.gate") is None

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            (Choice(bits=5, group_size=32), r"no 5-bit weights; use --bits 2 3 4 8, or another --format"),
            (
                Choice(bits=4, group_size=48),
                r"no groups of 48 for 96 inputs; use --group-size with one of channel 16 32 64 ",
            ),
            (Choice(bits=4, group_size=64), r"no groups of 64 for 96 inputs"),
        ],
    )
    def test_what_its_kernels_lack_is_refused_by_name(self, choice: Choice, message: str, tmp_path: Path) -> None:
        model = quantize(write_tiny(tmp_path / "model", "llama"))
        model = replace(model, choices={"model.layers.1.mlp.down_proj": choice})
        with pytest.raises(ConfigError, match=r"module model\.layers\.1\.mlp\.down_proj: GPTQ kernels have " + message):
            model.write(tmp_path / "out", format=CheckpointFormat.GPTQ)
        assert not (tmp_path / "out").exists()

    def test_rows_that_fill_no_words_are_refused(self, tmp_path: Path) -> None:
        model = quantize(write_tiny(tmp_path / "model", "qwen3"))  # k and v are 48 x 64
        model = replace(model, choices={"model.layers.0.self_attn.k_proj": Choice(bits=4, group_size=32)})
        with pytest.raises(ConfigError, match=r"k_proj: is 48 x 64; GPTQ packs multiples of 32"):
            model.write(tmp_path / "out", format=CheckpointFormat.GPTQ)

    def test_experts_of_a_block_share_a_choice(self, tmp_path: Path) -> None:
        def choose(index: int, spec: LinearSpec) -> Choice:
            return Choice(bits=8 if spec.input_site == "experts.1.down" else 4, group_size=32)

        model = quantize(write_tiny(tmp_path / "model", "mixtral"), choose=choose)
        with pytest.raises(ConfigError, match=r"GPTQ loads all experts of a block with one choice; give them one$"):
            model.write(tmp_path / "out", format=CheckpointFormat.GPTQ)

    @pytest.mark.parametrize("scale", [1e-7, 1e5])
    def test_a_scale_that_float16_lacks_is_refused(self, scale: float, tmp_path: Path) -> None:
        name = "model.layers.0.mlp.up_proj"
        model = quantize(write_tiny(tmp_path / "model", "llama"), choose=with_gptq_widths)
        good = model.load

        def load(module: str) -> QuantizedWeight:
            codes = good(module)
            if module == name:
                codes.scales[5, 1] = scale
            return codes

        with pytest.raises(CheckpointError, match=rf"module {name}: 1 of 192 scales are no float16 numbers"):
            replace(model, load=load).write(tmp_path / "out", format=CheckpointFormat.GPTQ)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("part", "change", "by_verifying", "by_reading"),
        [
            # a reader cannot tell a wrong code; verifying compares it with the one that was meant
            ("qweight", lambda t: t ^ 1, r"qweight in .* \d+ of \d+ values differ", None),
            ("qzeros", lambda t: t ^ 1, r"qzeros in .* values differ", "has zero points"),
            ("g_idx", lambda t: t + 1, r"g_idx in .* values differ", "columns are reordered"),
            ("scales", lambda t: t * float("inf"), r"scales in .* values differ", "not finite"),
            (
                "scales",
                lambda t: t[:, 1:].contiguous(),
                r"scales in .* is torch\.float16 \[1, 63\]",
                r"\[1, 63\], expected",
            ),
            ("qweight", None, r"qweight is in none of its files", "neither codes nor a weight"),
            ("g_idx", None, r"g_idx is in none of its files", "is in no file"),
        ],
    )
    def test_damage_is_named(
        self, part: str, change: Any, by_verifying: str, by_reading: str | None, tmp_path: Path
    ) -> None:
        model = quantize(write_tiny(tmp_path / "model", "llama"), choose=with_gptq_widths)
        output = tmp_path / "out"
        model.write(output, format=CheckpointFormat.GPTQ)
        path, name = output / "model.safetensors", "model.layers.1.mlp.down_proj"
        tensors = load_file(path)
        damaged = tensors.pop(f"{name}.{part}")
        if change is not None:
            tensors[f"{name}.{part}"] = change(damaged)
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=by_verifying):
            verify(model, output, CheckpointFormat.GPTQ)
        if by_reading is not None:
            with pytest.raises(CheckpointError, match=by_reading):
                StoredCheckpoint(output).codes(name)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"desc_act": True}, "not the configuration"),
            ({"sym": False}, "not the configuration"),
            ({"bits": 5}, "not the configuration"),
            ({"checkpoint_format": "gptq_v2"}, "not the configuration"),
            ({"dynamic": {"+:(": {}}}, "not the configuration"),
            ({"dynamic": {}}, r"qweight is torch\.int32 \[6, 64\], expected torch\.int32 \[9, 64\]"),
        ],
    )
    def test_a_configuration_that_does_not_fit(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        model = quantize(write_tiny(tmp_path / "model", "llama"), choose=with_gptq_widths)
        model.write(tmp_path / "out", format=CheckpointFormat.GPTQ)
        path = tmp_path / "out/config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= change
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            StoredCheckpoint(tmp_path / "out").codes("model.layers.1.mlp.down_proj")
