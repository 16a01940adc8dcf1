"""A written checkpoint loads with plain transformers and computes what the dense dequantized model does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lrpq.checkpoint.assemble import planned_size, write_checkpoint
from lrpq.checkpoint.verify import probe_ids, verify_checkpoint
from lrpq.errors import CheckpointError, ConfigError, ModelError
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.packing import storage_bits

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MODULES = [f"model.layers.{block}.{kind}" for block in range(3) for kind in KINDS]
KEPT_DENSE = "model.layers.1.self_attn.o_proj"
PALETTE = [Choice(bits=bits, group_size=group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, -1)]
MIXED = {name: PALETTE[(5 * i) % len(PALETTE)] for i, name in enumerate(MODULES) if name != KEPT_DENSE}


def make_source(
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    sharded: bool = False,
    hidden: int = 64,
    bias: bool = False,
) -> ModelSource:
    """A random Llama with grouped queries, saved as transformers saves it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=bias,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # biases and norms start as constants, which a swapped tensor would not show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB" if sharded else "5GB")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
        "code.py",
    ):
        (folder / name).write_text(f"contents of {name}")
    return ModelSource(folder)


def make_codes(source: ModelSource, choices: dict[str, Choice]) -> Callable[[str], QuantizedWeight]:
    """Codes over the whole range of their bits, made anew from the module's number at every call."""

    def load(name: str) -> QuantizedWeight:
        choice = choices[name]
        d_out, d_in = source.shape(name + ".weight")
        generator = torch.Generator().manual_seed(MODULES.index(name))
        half = 1 << (choice.bits - 1)
        codes = torch.randint(-half, half, (d_out, d_in), generator=generator).to(torch.int8)
        scales = (torch.rand(d_out, choice.groups(d_in), generator=generator) + 0.5) * 0.1 / half
        scales[::3] *= -1  # a grid may be mirrored
        return QuantizedWeight(codes=codes, scales=scales.to(torch.bfloat16), choice=choice)

    return load


def all_tensors(folder: Path) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        merged.update(load_file(path))
    return merged


def flip_byte(path: Path, name: str, *, position: int = 0) -> None:
    """Flip the lowest bit of a byte of one tensor in place."""
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
    raw[8 + length + start + position] ^= 1
    path.write_bytes(raw)


@contextmanager
def restored(path: Path) -> Iterator[Path]:
    """Put a file back as it was, so that the tests of damage can share one checkpoint."""
    intact = path.read_bytes()
    try:
        yield path
    finally:
        path.write_bytes(intact)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return make_source(tmp_path_factory.mktemp("shared") / "in")


@pytest.fixture(scope="module")
def written(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shared") / "out"
    write_checkpoint(source, output, quantized=make_codes(source, MIXED), choices=MIXED, manifest={})
    return output


@pytest.mark.parametrize(
    ("dtype", "tied", "sharded", "hidden", "bias"),
    [
        (torch.bfloat16, True, False, 64, False),
        (torch.bfloat16, False, True, 64, True),
        (torch.float32, False, False, 64, False),
        (torch.float32, True, True, 64, True),
        (torch.float16, False, False, 64, False),
    ],
)
def test_mixed_checkpoint_reloads_exactly_and_is_as_large_as_planned(
    tmp_path: Path, dtype: torch.dtype, tied: bool, sharded: bool, hidden: int, bias: bool
) -> None:
    source = make_source(tmp_path / "in", dtype=dtype, tied=tied, sharded=sharded, hidden=hidden, bias=bias)
    output = tmp_path / "out"
    load = make_codes(source, MIXED)
    size = write_checkpoint(source, output, quantized=load, choices=MIXED, manifest={"a": 1})

    result = verify_checkpoint(output, source, quantized=load, choices=MIXED)
    assert result.max_abs_difference == 0.0
    assert result.num_modules == len(MIXED) == 20
    assert result.num_copied == len(source.names()) - len(MIXED)

    # said again without the verifier's own code: every weight of the model a user gets
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == dtype
    with torch.no_grad():
        logits = model(probe_ids(96)).logits
    dense = AutoModelForCausalLM.from_pretrained(source.folder)
    for name in MODULES:
        expected = source.read(name + ".weight")
        if name in MIXED:
            weight = load(name)
            width = weight.codes.shape[1] // weight.scales.shape[1]
            expected = weight.scales.to(dtype).repeat_interleave(width, dim=1) * weight.codes.to(dtype)
        assert torch.equal(model.get_submodule(name).weight, expected), name
        dense.get_submodule(name).weight.data = expected.clone()
    with torch.no_grad():
        assert torch.equal(dense(probe_ids(96)).logits, logits)

    assert size == planned_size(source, MIXED)
    assert size.total_bytes == sum(p.stat().st_size for p in output.glob("*.safetensors"))
    assert size.quantized_bits == sum(
        storage_bits(*source.shape(name + ".weight"), choice) for name, choice in MIXED.items()
    )
    stored = all_tensors(output)
    assert size.metadata_bits == 128 * len(MIXED)
    codes_and_scales = sum(t.nbytes for n, t in stored.items() if n.endswith(("weight_packed", "weight_scale")))
    assert size.fixed_bytes == size.total_bytes - codes_and_scales
    assert ("lm_head.weight" in stored) == (not tied)
    assert (output / "model.safetensors").is_file()


def test_average_bits_is_what_an_independent_reader_of_the_files_finds(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", hidden=72)
    choices = {n: Choice(bits=(3, 5, 6)[i % 3], group_size=(-1, 24, 36)[i % 3]) for i, n in enumerate(MODULES)}
    load = make_codes(source, choices)
    size = write_checkpoint(source, tmp_path / "out", quantized=load, choices=choices, manifest={})
    bits = weights = 0
    with safe_open(tmp_path / "out/model.safetensors", "pt") as f:
        for name in f.keys():  # noqa: SIM118 - not a mapping
            tensor = f.get_tensor(name)
            if name.endswith(("weight_packed", "weight_scale")):
                bits += tensor.nbytes * 8
            elif name.endswith("weight_shape"):
                weights += int(tensor.prod())
    assert size.average_bits == bits / weights
    assert size.num_quantized_weights == weights
    # rows of 72 codes do not end on a word: the padding is in the figure
    assert size.average_bits > sum(choices[n].bits for n in MODULES) / len(MODULES)
    assert verify_checkpoint(tmp_path / "out", source, quantized=load, choices=choices).max_abs_difference == 0.0


def test_sharded_output_is_named_indexed_and_exact(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in")
    load = make_codes(source, MIXED)
    limit = 20_000
    size = write_checkpoint(source, tmp_path / "out", quantized=load, choices=MIXED, manifest={}, max_shard_bytes=limit)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert size == planned_size(source, MIXED, max_shard_bytes=limit)
    assert size.total_bytes == sum((tmp_path / "out" / name).stat().st_size for name in files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors(tmp_path / "out").values())
    for name in files:
        tensors = load_file(tmp_path / "out" / name)
        assert sum(t.nbytes for t in tensors.values()) <= limit
        assert {n for n, file in index["weight_map"].items() if file == name} == set(tensors)
    assert verify_checkpoint(tmp_path / "out", source, quantized=load, choices=MIXED).max_abs_difference == 0.0


def test_same_content_gives_the_same_bytes_whatever_the_order_and_the_source_files(tmp_path: Path) -> None:
    one, many = make_source(tmp_path / "one"), make_source(tmp_path / "many", sharded=True)
    reordered = dict(sorted(MIXED.items(), reverse=True))
    write_checkpoint(one, tmp_path / "a", quantized=make_codes(one, MIXED), choices=MIXED, manifest={"at": 1})
    write_checkpoint(many, tmp_path / "b", quantized=make_codes(many, MIXED), choices=reordered, manifest={"at": 2})
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {p.name for p in (tmp_path / "b").iterdir()}
    differing = {n for n in names if (tmp_path / "a" / n).read_bytes() != (tmp_path / "b" / n).read_bytes()}
    assert differing == {"lrpq.json"}


def test_everything_a_user_needs_is_carried_over(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in")
    manifest = {"budget_bits": 3.25, "name": "größer"}
    write_checkpoint(source, tmp_path / "out", quantized=make_codes(source, MIXED), choices=MIXED, manifest=manifest)
    carried = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        "generation_config.json",
    }
    made = {"model.safetensors", "config.json", "lrpq.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == carried | made
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (source.folder / name).read_bytes()
    assert json.loads((tmp_path / "out/lrpq.json").read_text(encoding="utf-8")) == manifest
    config = json.loads((tmp_path / "out/config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source.folder / "config.json").read_text())
    assert quantization["ignore"] == ["lm_head", KEPT_DENSE]


def test_dtype_is_kept_when_the_original_does_not_name_it(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", dtype=torch.float32)
    path = source.folder / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    source = ModelSource(source.folder)
    load = make_codes(source, MIXED)
    write_checkpoint(source, tmp_path / "out", quantized=load, choices=MIXED, manifest={})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    verify_checkpoint(tmp_path / "out", source, quantized=load, choices=MIXED)


class TestDamageIsFound:
    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (f"{MODULES[9]}.weight_packed", rf"{MODULES[9]}: 1 of \d+ values differ, by up to 0\.0"),
            (f"{MODULES[0]}.weight_scale", f"{MODULES[0]}: .* values differ"),
            (f"{MODULES[0]}.weight_shape", "weight_shape in .* 1 of 2 values differ, by up to 1"),
            ("model.embed_tokens.weight", r"model\.embed_tokens\.weight in .* 1 of 6144 values differ"),
            (f"{KEPT_DENSE}.weight", f"{KEPT_DENSE}.weight in .* 1 of 4096 values differ"),
        ],
    )
    def test_flipped_bit(self, source: ModelSource, written: Path, tensor: str, message: str) -> None:
        with restored(written / "model.safetensors") as path:
            flip_byte(path, tensor)
            with pytest.raises(CheckpointError, match=message):
                verify_checkpoint(written, source, quantized=make_codes(source, MIXED), choices=MIXED)

    def test_truncated_file(self, source: ModelSource, written: Path) -> None:
        with restored(written / "model.safetensors") as path:
            path.write_bytes(path.read_bytes()[:-2])
            with pytest.raises(CheckpointError, match="truncated or damaged"):
                verify_checkpoint(written, source, quantized=make_codes(source, MIXED), choices=MIXED)

    def test_missing_tensor(self, source: ModelSource, written: Path) -> None:
        with restored(written / "model.safetensors") as path:
            tensors = load_file(path)
            del tensors["model.norm.weight"]
            save_file(tensors, path, metadata={"format": "pt"})
            with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in none"):
                verify_checkpoint(written, source, quantized=make_codes(source, MIXED), choices=MIXED)

    def test_module_left_out_of_the_configuration(self, source: ModelSource, written: Path) -> None:
        with restored(written / "config.json") as path:
            config = json.loads(path.read_text())
            del config["quantization_config"]["config_groups"]["group_0"]
            path.write_text(json.dumps(config))
            with pytest.raises(CheckpointError, match="missing keys"):
                verify_checkpoint(written, source, quantized=make_codes(source, MIXED), choices=MIXED)

    def test_logits_of_another_model(self, source: ModelSource, written: Path) -> None:
        output = written
        load = make_codes(source, MIXED)
        dense = AutoModelForCausalLM.from_pretrained(source.folder)

        def original(ids: Tensor) -> Tensor:
            with torch.no_grad():
                return dense(ids).logits

        with pytest.raises(CheckpointError, match=r"logits differ from the dense .* at token"):
            verify_checkpoint(output, source, quantized=load, choices=MIXED, dense_logits=original)
        loose = verify_checkpoint(output, source, quantized=load, choices=MIXED, dense_logits=original, tolerance=1e3)
        assert 0 < loose.max_abs_difference < 1e3
        with pytest.raises(CheckpointError, match="logits"):
            verify_checkpoint(
                output,
                source,
                quantized=load,
                choices=MIXED,
                dense_logits=lambda ids: original(ids) * float("nan"),
                tolerance=1e3,
            )


class TestNothingHalfWritten:
    def test_failure_in_the_middle_leaves_nothing(self, tmp_path: Path) -> None:
        source = make_source(tmp_path / "in")
        load = make_codes(source, MIXED)
        seen: list[str] = []

        def failing(name: str) -> QuantizedWeight:
            seen.append(name)
            if len(seen) == 7:
                raise RuntimeError("the store is gone")
            return load(name)

        with pytest.raises(RuntimeError, match="the store is gone"):
            write_checkpoint(source, tmp_path / "out", quantized=failing, choices=MIXED, manifest={})
        assert [p.name for p in tmp_path.iterdir()] == ["in"]
        assert len(set(seen)) == 7  # one module at a time, each once

    def test_failed_overwrite_keeps_the_old_one(self, tmp_path: Path) -> None:
        source = make_source(tmp_path / "in")
        load = make_codes(source, MIXED)
        output = tmp_path / "out"
        write_checkpoint(source, output, quantized=load, choices=MIXED, manifest={"run": 1})
        with pytest.raises(ConfigError, match="not empty"):
            write_checkpoint(source, output, quantized=load, choices=MIXED, manifest={"run": 2})
        with pytest.raises(CheckpointError, match="no codes"):
            write_checkpoint(
                source, output, quantized=lambda _: None, choices=MIXED, manifest={"run": 2}, overwrite=True
            )
        verify_checkpoint(output, source, quantized=load, choices=MIXED)
        fewer = {MODULES[0]: Choice(bits=4, group_size=32)}
        write_checkpoint(
            source,
            output,
            quantized=make_codes(source, fewer),
            choices=fewer,
            manifest={"run": 3},
            overwrite=True,
        )
        assert json.loads((output / "lrpq.json").read_text()) == {"run": 3}
        verify_checkpoint(output, source, quantized=make_codes(source, fewer), choices=fewer)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]

    def test_the_original_is_never_the_output(self, tmp_path: Path) -> None:
        source = make_source(tmp_path / "all/in")
        (tmp_path / "all/lrpq.json").write_text("{}")
        (source.folder / "lrpq.json").write_text("{}")
        for output in (source.folder, tmp_path / "all"):
            with pytest.raises(ConfigError, match="original"):
                write_checkpoint(
                    source,
                    output,
                    quantized=make_codes(source, MIXED),
                    choices=MIXED,
                    manifest={},
                    overwrite=True,
                )
        assert (source.folder / "model.safetensors").is_file()


class TestWhatCannotBeStoredIsRefused:
    @pytest.mark.parametrize(
        ("choices", "error", "message"),
        [
            ({}, ConfigError, "no module is quantized"),
            ({MODULES[0]: Choice(bits=9, group_size=32)}, ConfigError, "9 bits"),
            ({MODULES[0]: Choice(bits=1, group_size=32)}, ConfigError, "1 bits"),
            ({MODULES[0]: Choice(bits=4, group_size=48)}, ConfigError, "48 does not divide its 64 inputs"),
            ({MODULES[0]: Choice(bits=4, group_size=0)}, ConfigError, "group size 0"),
            (
                {"model.layers.7.mlp.up_proj": Choice(bits=4, group_size=32)},
                ModelError,
                "layers.7.mlp.up_proj",
            ),
            ({"model.norm": Choice(bits=4, group_size=32)}, ModelError, r"model\.norm.*matrix"),
            ({"model.embed_tokens": Choice(bits=4, group_size=32)}, ModelError, "not a linear layer"),
        ],
    )
    def test_choice(
        self,
        source: ModelSource,
        tmp_path: Path,
        choices: dict[str, Choice],
        error: type[Exception],
        message: str,
    ) -> None:
        def never(name: str) -> QuantizedWeight:
            raise AssertionError(f"{name} was loaded")

        with pytest.raises(error, match=message):
            write_checkpoint(source, tmp_path / "out", quantized=never, choices=choices, manifest={})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"choice": Choice(bits=5, group_size=32)}, "5b/g32 but the choice is 4b/g32"),
            ({"codes": torch.zeros(64, 32, dtype=torch.int8)}, r"\[64, 32\]"),
            ({"codes": torch.full((64, 64), 8, dtype=torch.int8)}, "do not fit 4 bits"),
            ({"codes": torch.full((64, 64), -9, dtype=torch.int8)}, "do not fit 4 bits"),
            ({"scales": torch.full((64, 2), float("nan"), dtype=torch.bfloat16)}, "NaN"),
            ({"scales": torch.ones(64, 2)}, "expected torch.bfloat16"),
            ({"zero_points": torch.zeros(64, 2, dtype=torch.int8)}, "zero points"),
        ],
    )
    def test_codes(self, source: ModelSource, tmp_path: Path, change: dict[str, object], message: str) -> None:
        choices = {MODULES[0]: Choice(bits=4, group_size=32)}
        good = make_codes(source, choices)(MODULES[0])
        fields = {
            "codes": good.codes,
            "scales": good.scales,
            "choice": good.choice,
            "zero_points": None,
            **change,
        }
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint(
                source,
                tmp_path / "out",
                quantized=lambda _: QuantizedWeight(**fields),
                choices=choices,
                manifest={},
            )
        assert not list(tmp_path.iterdir())

    def test_manifest_that_is_not_json_is_refused_before_anything_is_written(
        self, source: ModelSource, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match=r"lrpq\.json"):
            write_checkpoint(
                source,
                tmp_path / "out",
                quantized=make_codes(source, MIXED),
                choices=MIXED,
                manifest={"kl": float("nan")},
            )
        assert not list(tmp_path.iterdir())
