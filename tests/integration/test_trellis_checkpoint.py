"""Checkpoints of the trellis format: what is on disk, what lrpq and transformers read, and what is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint_families import quantize
from test_checkpoint_roundtrip import KEPT_DENSE, MODULES, all_tensors, flip_byte, make_source, restored
from tiny_models import CASES, write_tiny
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import lrpq.quant
from lrpq.checkpoint.assemble import planned_size, write_checkpoint
from lrpq.checkpoint.formats import CheckpointFormat, storage_bits
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.checkpoint.verify import probe_ids, verify_checkpoint
from lrpq.classifier import load_classifier
from lrpq.errors import CheckpointError, ConfigError, QuantizationError
from lrpq.loading import PackedLinear, TrellisConfig, register
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.packing import pack
from tasks.artifacts import StageFolder
from tasks.refine import COUNTS, QuantizedModule, read_refined, store_module
from tasks.store.opened import open_store

HIDDEN = 144
"""One whole segment and one of 16 rows; 72 rows of keys, 288 inside the MLP: two whole ones and one of 32."""
TRELLIS = CheckpointFormat.TRELLIS
PALETTE = [
    *(
        Choice(bits=bits, group_size=size, scale_bits=scale_bits, trellis=True)
        for bits in (2, 3, 4, 5, 6)
        for size, scale_bits in ((48, 8), (16, 16), (-1, 16))
    ),
    Choice(bits=8, group_size=48, scale_bits=8),
    Choice(bits=8, group_size=-1),
    Choice(bits=3, group_size=16),
]
MIXED = {name: PALETTE[(5 * i) % len(PALETTE)] for i, name in enumerate(MODULES) if name != KEPT_DENSE}
STREAMS = next(name for name, choice in MIXED.items() if choice.trellis and choice.scale_bits == 8)
CODEBOOKS = load_file(Path(lrpq.quant.__file__).with_name("trellis_codebooks.safetensors"))

Loader = Callable[[str], QuantizedWeight]


def make_codes(source: ModelSource, choices: dict[str, Choice]) -> Loader:
    """Codes over the whole range of their bits, made anew from the module's name at every call."""

    def load(name: str) -> QuantizedWeight:
        choice = choices[name]
        d_out, d_in = source.shape(name + ".weight")
        generator = torch.Generator().manual_seed(len(name) + choice.bits)
        half = 1 << (choice.bits - 1)
        codes = torch.randint(-half, half, (d_out, d_in), generator=generator).to(torch.int8)
        scales = (torch.rand(d_out, choice.groups(d_in), generator=generator) + 0.5) * 0.1
        scales = scales if choice.trellis else scales / half
        scales = scales.to(torch.float8_e4m3fn) if choice.scale_bits == 8 else scales
        return QuantizedWeight(codes=codes, scales=scales.to(torch.bfloat16), choice=choice)

    return load


def by_hand(tensors: dict[str, Tensor], name: str, choice: Choice, dtype: torch.dtype) -> Tensor:
    """Weight by the format's definition, bit by bit: of streams the codebook's value at twelve bits times the scale."""
    words, scales = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    d_out, d_in = tensors[f"{name}.weight_shape"].tolist()
    width = d_in // scales.shape[1]
    raw = words.numpy().view(np.uint32)
    if not choice.trellis:
        bits = (raw[:, :, None] >> np.arange(32, dtype=np.uint32) & 1).reshape(d_out, -1)[:, : d_in * choice.bits]
        codes = bits.reshape(d_out, d_in, choice.bits) @ (1 << np.arange(choice.bits)) - (1 << (choice.bits - 1))
        return torch.from_numpy(codes).to(dtype) * scales.to(dtype).repeat_interleave(width, dim=1)
    book, values, first = CODEBOOKS[f"bits_{choice.bits}"].float().numpy(), [], 0
    for start in range(0, d_out, 128):
        rows = min(128, d_out - start)
        total = rows * choice.bits
        taken = raw[first : first + -(-total // 32)]
        first += len(taken)
        bits = (taken[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None] & 1).reshape(-1, d_in)
        assert not bits[total:].any()
        window = total - (np.arange(rows)[:, None] + 1) * choice.bits + np.arange(12)
        values.append(book[(bits[window % total] << np.arange(12)[None, :, None]).sum(axis=1)])
    assert first == len(raw)
    return (torch.from_numpy(np.concatenate(values)) * scales.float().repeat_interleave(width, dim=1)).to(dtype)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(probe_ids(96)).logits


def write(source: ModelSource, output: Path, choices: dict[str, Choice] = MIXED, **options: Any) -> Any:
    arguments = {"manifest": {}, "format": TRELLIS, **options}
    return write_checkpoint(source, output, quantized=make_codes(source, choices), choices=choices, **arguments)


def verify(source: ModelSource, output: Path, choices: dict[str, Choice] = MIXED) -> Any:
    return verify_checkpoint(output, source, quantized=make_codes(source, choices), choices=choices, format=TRELLIS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return make_source(tmp_path_factory.mktemp("shared") / "in", hidden=HIDDEN, bias=True)


@pytest.fixture(scope="module")
def written(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shared") / "out"
    write(source, output)
    return output


def test_the_choices_are_of_every_kind() -> None:
    used = set(MIXED.values())
    assert {choice.bits for choice in used if choice.trellis} == {2, 3, 4, 5, 6}
    assert {(choice.trellis, choice.scale_bits) for choice in used} == {(t, b) for t in (True, False) for b in (8, 16)}
    assert {choice.group_size for choice in used if choice.trellis} == {48, 16, -1}


@pytest.mark.parametrize(
    ("dtype", "tied", "sharded", "bias"),
    [
        (torch.bfloat16, False, True, True),
        (torch.bfloat16, True, False, False),
        (torch.float32, False, False, True),
        (torch.float16, False, False, False),
    ],
)
def test_transformers_loads_it_exactly_and_it_is_as_large_as_planned(
    dtype: torch.dtype, tied: bool, sharded: bool, bias: bool, tmp_path: Path
) -> None:
    source = make_source(tmp_path / "in", dtype=dtype, tied=tied, sharded=sharded, bias=bias, hidden=HIDDEN)
    output = tmp_path / "out"
    size = write(source, output, max_shard_bytes=200_000 if sharded else 10**9)
    assert len(list(output.glob("*.safetensors"))) > 1 or not sharded
    result = verify(source, output)
    assert (result.loader, result.max_abs_difference) == ("transformers with lrpq.loading", 0.0)
    assert (result.num_modules, result.num_tokens) == (len(MIXED), 32)
    assert result.num_copied == len(source.names()) - len(MIXED)

    # said again without the verifier's own code
    model, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == dtype
    dense = AutoModelForCausalLM.from_pretrained(source.folder)
    stored = all_tensors(output)
    for name in MODULES:
        layer = model.get_submodule(name)
        expected = source.read(name + ".weight")
        if name in MIXED:
            assert isinstance(layer, PackedLinear)
            assert torch.equal(layer.weight_packed, stored[f"{name}.weight_packed"])
            assert layer.weight_scale.dtype == torch.bfloat16
            assert torch.equal(layer.weight_scale, stored[f"{name}.weight_scale"].to(torch.bfloat16))
            expected = by_hand(stored, name, MIXED[name], dtype)
        assert torch.equal(layer.weight, expected), name
        if bias and "self_attn" in name:
            assert torch.equal(layer.bias, source.read(name + ".bias"))
        dense.get_submodule(name).weight.data = expected.clone()
    assert torch.equal(logits(model), logits(dense))

    assert size == planned_size(source, MIXED, format=TRELLIS, max_shard_bytes=200_000 if sharded else 10**9)
    assert size.total_bytes == sum(path.stat().st_size for path in output.glob("*.safetensors"))
    made = [tensor.nbytes for name, tensor in stored.items() if name.endswith(("weight_packed", "weight_scale"))]
    assert size.quantized_bits == 8 * sum(made)


def test_lrpq_reads_back_what_was_written(source: ModelSource, written: Path) -> None:
    stored, load = StoredCheckpoint(written), make_codes(source, MIXED)
    assert stored.format is TRELLIS
    assert stored.modules() == sorted(MIXED)
    assert stored.choice(KEPT_DENSE) is None
    assert stored.codes(KEPT_DENSE) is None
    assert torch.equal(stored.dense(KEPT_DENSE), source.read(KEPT_DENSE + ".weight"))
    for name, choice in MIXED.items():
        found, expected = stored.codes(name), load(name)
        assert found is not None
        assert found.choice == stored.choice(name) == choice
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)
        d_out, d_in = source.shape(name + ".weight")
        assert stored.packed_shape(name) == (d_out, d_in)
        spec = LinearSpec(name=name, block=0, d_out=d_out, d_in=d_in, input_site="x", fused_group=name)
        weight = stored.weight(spec, torch.bfloat16)
        assert weight is not None
        assert torch.equal(weight, by_hand(all_tensors(written), name, choice, torch.bfloat16))


def test_the_configuration_says_what_a_reader_needs(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"], config["version"]) == ("lrpq", "trellis", 1)
    assert (config["segment_rows"], config["state_bits"]) == (128, 12)
    assert config["ignore"] == ["lm_head", KEPT_DENSE]
    for bits in (2, 3, 4, 5, 6):
        values = CODEBOOKS[f"bits_{bits}"].to(torch.float16).numpy().tobytes()
        assert config["codebooks"][str(bits)] == hashlib.sha256(values).hexdigest()
    kinds = {(group["weights"]["type"], group["weights"]["num_bits"]) for group in config["config_groups"].values()}
    assert kinds == {*(("trellis", bits) for bits in (2, 3, 4, 5, 6)), ("int", 8), ("int", 3)} & {
        ("trellis" if choice.trellis else "int", choice.bits) for choice in MIXED.values()
    }


def test_uniform_codes_are_stored_as_compressed_tensors_has_them(source: ModelSource, tmp_path: Path) -> None:
    uniform = {name: replace(choice, trellis=False) for name, choice in MIXED.items()}
    write(source, tmp_path / "own", uniform)
    write(source, tmp_path / "packed", uniform, format=CheckpointFormat.COMPRESSED_TENSORS)
    assert (tmp_path / "own/model.safetensors").read_bytes() == (tmp_path / "packed/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "own/config.json").read_text())["quantization_config"]["codebooks"] == {}
    assert verify(source, tmp_path / "own", uniform).max_abs_difference == 0.0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("own", "packed")]
    assert torch.equal(*map(logits, models))


def test_dense_weights_are_those_of_the_same_codes(source: ModelSource, written: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "dense", format=CheckpointFormat.DENSE)
    load = make_codes(source, MIXED)
    result = verify_checkpoint(tmp_path / "dense", source, quantized=load, choices=MIXED, format=CheckpointFormat.DENSE)
    assert (result.loader, result.max_abs_difference) == ("transformers", 0.0)
    stored, packed = all_tensors(tmp_path / "dense"), all_tensors(written)
    for name, choice in MIXED.items():
        assert torch.equal(stored[f"{name}.weight"], by_hand(packed, name, choice, torch.bfloat16))


@pytest.mark.parametrize("name", sorted(set(CASES) - {"llama", "mixtral", "qwen3-moe"}))
def test_every_architecture_loads(name: str, tmp_path: Path) -> None:
    """Steps of a grid and, where there are rows for it, symbols; under the names that transformers has for layers."""
    steps = quantize(write_tiny(tmp_path / "model", name))
    symbols = {name: c.bits != 8 and steps.load(name).codes.shape[0] >= 16 for name, c in steps.choices.items()}
    choices = {name: replace(choice, trellis=symbols[name]) for name, choice in steps.choices.items()}
    model = replace(steps, choices=choices, load=lambda name: replace(steps.load(name), choice=choices[name]))
    model.write(tmp_path / "out", format=TRELLIS)
    result = model.verify(tmp_path / "out", format=TRELLIS)
    assert (result.loader, result.max_abs_difference) == ("transformers with lrpq.loading", 0.0)
    assert any(symbols.values())


@pytest.mark.parametrize("imported", [False, True])
def test_transformers_alone_refuses_it_and_makes_no_weights(written: Path, imported: bool) -> None:
    """In a process of its own, where nothing else has made the format known."""
    lines = ["from transformers import AutoConfig, AutoModelForCausalLM", *["import lrpq.loading"] * imported]
    lines += [f"folder = {str(written)!r}", "print(AutoModelForCausalLM.from_pretrained(folder).config.model_type)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300)
    if imported:
        assert (done.returncode, done.stdout.split()) == (0, ["llama"])
    else:
        assert done.returncode == 1
        assert "has model type `lrpq` but Transformers does not recognize" in done.stderr


@pytest.mark.parametrize("own", [None, "no-such-type", "lrpq", 3])
def test_a_type_that_hides_none_is_an_error(written: Path, tmp_path: Path, own: object) -> None:
    document = json.loads((written / "config.json").read_text())
    assert (document["model_type"], document["lrpq_model_type"]) == ("lrpq", "llama")
    document |= {"lrpq_model_type": own}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"lrpq_model_type is .*, no model type"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


class TestInTransformers:
    def test_weights_are_decoded_once_where_that_is_asked_for(self, written: Path, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match=r"loading attributes \(e\.g\. \['dequantize'\]\)"):
            plain = AutoModelForCausalLM.from_pretrained(written, quantization_config=TrellisConfig(dequantize=True))
        packed = AutoModelForCausalLM.from_pretrained(written)
        expected = logits(packed)
        later = packed.dequantize()
        for model in (plain, later):
            assert {type(model.get_submodule(name)) for name in MODULES} == {nn.Linear}
            assert not any("packed" in name for name in model.state_dict())
            assert torch.equal(logits(model), expected)
        plain.save_pretrained(tmp_path / "plain")
        assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), expected)

    def test_packed_layers_take_the_memory_of_the_file(self, source: ModelSource, written: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(written)
        layer = model.get_submodule(STREAMS)
        d_out, d_in = source.shape(STREAMS + ".weight")
        words = d_out * MIXED[STREAMS].bits // 32  # 144 rows: 4 and a half words a bit
        assert {name: tuple(tensor.shape) for name, tensor in layer.named_parameters() if name != "bias"} == {
            "weight_packed": (words, d_in),
            "weight_scale": (d_out, MIXED[STREAMS].groups(d_in)),
            "weight_shape": (2,),
        }
        assert not list(layer.named_buffers())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_a_model_of_another_type_has_the_same_scales(self, written: Path, dtype: torch.dtype) -> None:
        stored = all_tensors(written)
        loaded = AutoModelForCausalLM.from_pretrained(written, dtype=dtype)
        cast = AutoModelForCausalLM.from_pretrained(written).to(dtype)
        for name, choice in MIXED.items():
            expected = by_hand(stored, name, choice, dtype)
            assert torch.equal(loaded.get_submodule(name).weight, expected)
            assert torch.equal(cast.get_submodule(name).decoded(dtype), expected)

    def test_scales_that_float16_lacks_survive_a_cast(self, source: ModelSource) -> None:
        codes = make_codes(source, MIXED)(STREAMS)
        codes = replace(codes, choice=replace(codes.choice, scale_bits=16), scales=codes.scales * 2.0**-30)
        layer = PackedLinear(codes.choice, *codes.codes.shape, bias=True, dtype=torch.bfloat16)
        layer.load_state_dict(pack(codes) | {"bias": torch.ones(len(codes.codes))})
        expected = codes.dequantize()
        assert torch.equal(layer.to(torch.float16).to(torch.float32).decoded(torch.float32), expected)
        assert layer.bias.dtype == torch.float32

    def test_another_class_than_the_checkpoint_was_made_of(self, written: Path) -> None:
        with pytest.raises(CheckpointError, match=r"LlamaModel has no module \^model.* such as AutoModelForCausalLM"):
            AutoModel.from_pretrained(written)

    def test_registering_again_changes_nothing(self, written: Path) -> None:
        register()
        assert isinstance(AutoModelForCausalLM.from_pretrained(written).get_submodule(STREAMS), PackedLinear)

    def test_a_type_that_the_original_does_not_name(self, tmp_path: Path) -> None:
        """Transformers would take that of the first tensor in the file."""
        source = make_source(tmp_path / "in", dtype=torch.float32, hidden=HIDDEN)
        path = source.folder / "config.json"
        config = json.loads(path.read_text())
        del config["dtype"]
        path.write_text(json.dumps(config))
        write(ModelSource(source.folder), tmp_path / "out")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
        verify(ModelSource(source.folder), tmp_path / "out")


def of_symbols(weights: dict[str, Any]) -> dict[str, Any]:
    return {"group": {"targets": [f"re:^{STREAMS}$"], "weights": {"type": "trellis", **weights}}}


class TestDamage:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 2}, r"version 2; this version of lrpq reads 1"),
            ({"format": "other"}, r"format 'other'; this version of lrpq reads 'trellis'"),
            ({"segment_rows": 64}, r"segment_rows 64, expected 128"),
            ({"state_bits": 10}, r"state_bits 10, expected 12"),
            ({"codebooks": {"3": "0" * 64}}, r"a codebook of 3 bits that this version of lrpq does not have"),
            ({"codebooks": {"7": "0" * 64}}, r"a codebook of 7 bits that this version of lrpq does not have"),
            ({"codebooks": {}}, "expected symmetric integers"),
            ({"codebooks": None}, "not the configuration"),
            ({"config_groups": of_symbols({"num_bits": 8, "strategy": "channel"})}, "expected symmetric integers"),
            ({"config_groups": of_symbols({"num_bits": 4, "strategy": "tensor"})}, "not the configuration"),
            ({"config_groups": of_symbols({"num_bits": 4, "strategy": "channel", "type": "float"})}, "symmetric"),
        ],
    )
    def test_a_configuration_that_does_not_fit(self, change: dict[str, Any], message: str, written: Path) -> None:
        with restored(written / "config.json") as path:
            config = json.loads(path.read_text())
            config["quantization_config"] |= change
            path.write_text(json.dumps(config))
            with pytest.raises(CheckpointError, match=message):
                StoredCheckpoint(written)
            with pytest.raises(CheckpointError, match=message):
                AutoModelForCausalLM.from_pretrained(written)

    @pytest.mark.parametrize("missing", ["version", "segment_rows", "state_bits", "codebooks", "config_groups"])
    def test_a_configuration_with_a_hole(self, missing: str, written: Path) -> None:
        with restored(written / "config.json") as path:
            config = json.loads(path.read_text())
            del config["quantization_config"][missing]
            path.write_text(json.dumps(config))
            with pytest.raises(CheckpointError, match=rf"not the configuration of a packed checkpoint .*{missing}"):
                StoredCheckpoint(written)

    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (f"{STREAMS}.weight_packed", rf"{STREAMS}: [1-9]\d* of \d+ values differ"),
            (f"{STREAMS}.weight_scale", rf"{STREAMS}: [1-9]\d* of \d+ values differ"),
            (f"{STREAMS}.weight_shape", r"weight_shape in .* 1 of 2 values differ, by up to 1"),
            ("model.embed_tokens.weight", r"model\.embed_tokens\.weight in .* 1 of \d+ values differ"),
        ],
    )
    def test_the_proof_finds_a_flipped_bit(self, tensor: str, message: str, source: ModelSource, written: Path) -> None:
        with restored(written / "model.safetensors") as path:
            flip_byte(path, tensor)
            with pytest.raises(CheckpointError, match=message):
                verify(source, written)

    def test_the_proof_finds_a_layer_that_is_not_described(self, source: ModelSource, written: Path) -> None:
        with restored(written / "config.json") as path:
            config = json.loads(path.read_text())
            del config["quantization_config"]["config_groups"]["group_0"]
            path.write_text(json.dumps(config))
            with pytest.raises(CheckpointError, match="missing keys"):
                verify(source, written)
            name = min(MIXED, key=lambda name: MIXED[name])
            with pytest.raises(CheckpointError, match=rf"{name} in .*: has packed codes but no group in config\.json"):
                StoredCheckpoint(written).codes(name)

    @pytest.mark.parametrize(
        ("part", "change", "message"),
        [
            ("weight_packed", lambda t: t[1:], r"is no \S+/trellis layer of \d+ x \d+: expected \("),
            ("weight_packed", lambda t: t.float(), r"is F32 with 2 dimensions, expected I32"),
            ("weight_scale", lambda t: t[:, 1:], r"is no \S+/trellis layer"),
            ("weight_scale", lambda t: t.bfloat16(), r"scales are torch\.bfloat16, those of a \S+ layer .*float8"),
            ("weight_scale", lambda t: t.float().fill_(torch.nan).to(t.dtype), "a scale is not finite"),
            ("weight_shape", lambda t: t + torch.tensor([128, 0]), r"is no \S+/trellis layer"),
            ("weight_shape", lambda t: t * 0, r"has the shape \[0, 0\], expected two sizes"),
            ("weight_shape", None, "is in no file"),
        ],
    )
    def test_what_is_read_is_checked(self, part: str, change: Any, message: str, written: Path) -> None:
        with restored(written / "model.safetensors") as path:
            tensors = load_file(path)
            damaged = tensors.pop(f"{STREAMS}.{part}")
            if change is not None:
                tensors[f"{STREAMS}.{part}"] = change(damaged).contiguous()
            save_file(tensors, path, metadata={"format": "pt"})
            with pytest.raises(CheckpointError, match=message):
                StoredCheckpoint(written).codes(STREAMS)

    def test_transformers_meets_another_shape(self, written: Path) -> None:
        with restored(written / "model.safetensors") as path:
            flip_byte(path, f"{STREAMS}.weight_shape")
            with pytest.raises(
                CheckpointError, match=rf"module {STREAMS}: is \[145, 144\] in the file, \[144, 144\] in"
            ):
                AutoModelForCausalLM.from_pretrained(written)


class TestRefusals:
    @pytest.mark.parametrize("format", [CheckpointFormat.COMPRESSED_TENSORS, CheckpointFormat.GPTQ])
    def test_formats_whose_readers_would_take_symbols_for_steps(self, format: CheckpointFormat, tmp_path: Path) -> None:
        source = make_source(tmp_path / "in")
        choices = {MODULES[4]: Choice(bits=4, group_size=32, trellis=True)}
        with pytest.raises(ConfigError, match=rf"module {MODULES[4]}: .* no place .*; use --format trellis or dense"):
            write(source, tmp_path / "out", choices, format=format)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("hidden", "bits"), [(136, 4), (144, 8), (144, 7)])
    def test_what_has_no_stream(self, hidden: int, bits: int, tmp_path: Path) -> None:
        source = make_source(tmp_path / "in", hidden=hidden)
        choices = {MODULES[0]: Choice(bits=bits, group_size=-1, trellis=True)}
        with pytest.raises(
            ConfigError, match=rf"module {MODULES[0]}: {bits}b/channel/trellis is no trellis of {hidden}"
        ):
            write(source, tmp_path / "out", choices)
        assert not (tmp_path / "out").exists()

    def test_a_classifiers_loader_wants_steps(self, written: Path) -> None:
        with pytest.raises(CheckpointError, match=r"is a trellis checkpoint; expected one of compressed-tensors"):
            load_classifier(written)

    def test_tensors_that_would_cut_a_segment(self, tmp_path: Path) -> None:
        """Gate and up projection of an expert are two tensors on disk and one layer."""
        model = with_trellis_experts(tmp_path / "model", intermediate=96)
        with pytest.raises(QuantizationError, match=r"experts\.0\.gate_up_proj: parts of \[96, 96\] rows cut segments"):
            model.write(tmp_path / "out", format=TRELLIS)
        assert not (tmp_path / "out").exists()


def with_trellis_experts(
    folder: Path, *, intermediate: int, choose: Callable[[int, LinearSpec], Choice] | None = None
) -> Any:
    def same(index: int, spec: LinearSpec) -> Choice:
        return Choice(bits=3 if spec.routed else 4, group_size=32, trellis=True)

    model = quantize(write_tiny(folder, "mixtral", intermediate_size=intermediate), choose=choose or same)
    shapes = {spec.name: (spec.d_out, spec.d_in) for spec in model.specs}

    def load(name: str) -> QuantizedWeight:
        choice, g = model.choices[name], torch.Generator().manual_seed(len(name))
        d_out, d_in = shapes[name]
        half = 1 << (choice.bits - 1)
        codes = torch.randint(-half, half, (d_out, d_in), generator=g).to(torch.int8)
        scales = torch.rand(d_out, choice.groups(d_in), generator=g).add(0.5).mul(0.1).bfloat16()
        return QuantizedWeight(codes=codes, scales=scales, choice=choice)

    return replace(model, load=load)


class TestExperts:
    def test_their_files_are_compared_and_lrpq_reads_them(self, tmp_path: Path) -> None:
        model = with_trellis_experts(tmp_path / "model", intermediate=128)
        output = tmp_path / "out"
        size = model.write(output, format=TRELLIS)
        by_name = {spec.name: spec for spec in model.specs}
        assert size.quantized_bits == sum(storage_bits(by_name[n], c, TRELLIS) for n, c in model.choices.items())
        result = model.verify(output, format=TRELLIS)
        assert (result.loader, result.num_tokens, result.max_abs_difference) == (None, 0, None)
        assert result.num_modules == len(model.choices)
        stored = StoredCheckpoint(output)
        for spec in model.specs:
            weight = stored.weight(spec, torch.float32)
            assert weight is not None
            assert torch.equal(weight, model.load(spec.name).dequantize())
        with restored(output / "model.safetensors") as path:
            name = next(name for name in all_tensors(output) if ".experts." in name and name.endswith("_packed"))
            flip_byte(path, name)
            with pytest.raises(CheckpointError, match=rf"{name} in .* 1 of \d+ values differ"):
                model.verify(output, format=TRELLIS)

    def test_transformers_refuses_them_by_name(self, tmp_path: Path) -> None:
        model = with_trellis_experts(tmp_path / "model", intermediate=128)
        model.write(tmp_path / "out", format=TRELLIS)
        with pytest.raises(CheckpointError, match=r"experts: is no linear layer in transformers; use `lrpq evaluate`"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def test_those_of_a_block_share_a_choice(self, tmp_path: Path) -> None:
        def choose(index: int, spec: LinearSpec) -> Choice:
            return Choice(bits=5 if spec.input_site == "experts.1.down" else 3, group_size=32, trellis=True)

        model = with_trellis_experts(tmp_path / "model", intermediate=128, choose=choose)
        with pytest.raises(ConfigError, match=r"but lrpq loads all experts of a block with one choice; give them one$"):
            model.write(tmp_path / "out", format=TRELLIS)

    def test_attention_alone_is_loaded(self, tmp_path: Path) -> None:
        model = with_trellis_experts(tmp_path / "model", intermediate=128)
        dense = {spec.name for spec in model.specs if spec.routed}
        model = replace(model, choices={name: c for name, c in model.choices.items() if name not in dense})
        model.write(tmp_path / "out", format=TRELLIS)
        result = model.verify(tmp_path / "out", format=TRELLIS)
        assert (result.loader, result.max_abs_difference) == ("transformers with lrpq.loading", 0.0)


@pytest.mark.parametrize("trellis", [True, False])
def test_parts_of_a_refined_layer_are_stored_as_the_layer(trellis: bool, tmp_path: Path) -> None:
    """Packed where each was made, in any order; streams in whole segments, a row of which is no row of words."""
    choice, g = Choice(bits=5, group_size=16, trellis=trellis), torch.Generator().manual_seed(0)
    codes = torch.randint(-16, 16, (300, 48), generator=g).to(torch.int8)
    scales = torch.rand(300, 3, generator=g).bfloat16()
    whole = QuantizedWeight(codes=codes, scales=scales, choice=choice)
    parts, first = [], 0
    for part in whole.split([128, 128, 44]):
        counts = dict.fromkeys(COUNTS, "1")
        parts.append(QuantizedModule(name="m", first_row=first, weight=part, packed=pack(part), counts=counts))
        first += len(part.codes)
    folder = StageFolder(run_id="r", stage="refine", key="0" * 64)
    (tmp_path / "store").mkdir()
    job: Any = SimpleNamespace(stream=SimpleNamespace(store=str(tmp_path / "store")), folder=folder)
    for given in ((parts[2], parts[0], parts[1]), tuple(parts), None):
        one = QuantizedModule(name="m", first_row=0, weight=whole, packed=pack(whole), counts=counts)
        state: Any = None
        store_module(state, job, *(given or (one,)))
        found = read_refined(open_store(job.stream.store), folder, "m", choice)
        assert torch.equal(found.codes, codes)
        assert torch.equal(found.scales, scales)
