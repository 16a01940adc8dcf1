"""A quantized classifier on disk: what is written is what is read, computes the same to the bit, or is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from tiny_images import images
from tiny_images import write_classifier as write_model
from tiny_models import write_tiny
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lrpq.activations.apply import quantized_block
from lrpq.activations.attention import PATTERN
from lrpq.activations.calibrate import BlockGrids, Means, calibrate
from lrpq.activations.folding import fold_plan
from lrpq.activations.grids import LogarithmicGrid, UniformGrid, quantized
from lrpq.checkpoint.activations import TABLE, digest, stored_activations
from lrpq.checkpoint.assemble import write_checkpoint
from lrpq.checkpoint.formats import CheckpointFormat
from lrpq.checkpoint.plan import planned_size
from lrpq.classifier import load_classifier, read_classifier, verify_classifier, write_classifier
from lrpq.classifier.layers import GridLinear, QuantizedLinear
from lrpq.classifier.proof import loads_packed
from lrpq.errors import CheckpointError, ConfigError, LrpqError, QuantizationError
from lrpq.evaluate.classification import class_logits
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.rtn import round_to_nearest
from lrpq.transform.writing import write_folded

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
DENSE = 3
"""Of the layers, the one whose weights stay in full precision: the first block's output projection."""
PROBE = images(6, seed=11)
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Quantized:
    """A tiny folded classifier with grids of every kind and codes of every width."""

    stream: BlockStream
    grids: tuple[BlockGrids, ...]
    codes: Mapping[str, QuantizedWeight]

    @property
    def choices(self) -> dict[str, Choice]:
        return {name: weight.choice for name, weight in self.codes.items()}

    @property
    def parts(self) -> dict[str, Any]:
        """What is written, and what is verified."""
        return {
            "quantized": self.codes.__getitem__,
            "choices": self.choices,
            "specs": self.stream.specs,
            "grids": self.grids,
        }

    def write(self, output: Path, **options: Any) -> Any:
        return write_classifier(self.stream.source, output, **{**self.parts, "manifest": {"by": "test"}, **options})

    def verify(self, output: Path, **options: Any) -> Any:
        return verify_classifier(output, self.stream.source, **{**self.parts, **options})

    def logits(self, grids: tuple[BlockGrids, ...] | None = None) -> Tensor:
        """Of the evaluation that streams."""
        used = self.grids if grids is None else grids
        return class_logits(
            self.stream, PROBE, lambda i, block: quantized_block(self.stream, i, block, used[i], self.codes)
        )


def quantize(folder: Path, name: str) -> Quantized:
    """Rounded to nearest; a width of its own for every place and layer."""
    source = open_source(write_model(folder / "model", name))
    stream = BlockStream(source, dtype=torch.float32)
    found = calibrate(stream, images(12), widths=(3, 4, 8), means=Means.ALL & ~Means.JUDGED_BY_OUTPUT)
    widths = {key: (3, 4, 8)[i % 3] for i, key in enumerate(found.places)}
    write_folded(source, folder / "folded", fold_plan(stream, found.foldings(widths)), dtype=torch.float32)
    stream = BlockStream(open_source(folder / "folded"), dtype=torch.float32)
    grids = [dict(places) for places in found.grids(widths)]
    grids[0][PATTERN] = LogarithmicGrid(bits=4, scale=0.7312, steps_per_octave=2)
    shifted = UniformGrid(bits=4, scale=torch.tensor(0.0371), offset=torch.tensor(-0.16997))
    grids[1]["down"] = shifted
    chosen = [
        (spec, Choice(bits=WIDTHS[i % len(WIDTHS)], group_size=-1)) for i, spec in enumerate(stream.specs) if i != DENSE
    ]
    codes = {spec.name: round_to_nearest(stream.weight(spec), choice, name=spec.name) for spec, choice in chosen}
    return Quantized(stream, tuple(grids), codes)


@pytest.fixture(scope="module", params=["vit", "deit", "swin"])
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Quantized, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    found = quantize(folder, request.param)
    found.write(folder / "out")
    return found, folder / "out"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Quantized, Path]:
    folder = tmp_path_factory.mktemp("one")
    found = quantize(folder, "vit")
    found.write(folder / "out")
    return found, folder / "out"


def same_grid(a: Any, b: Any) -> bool:
    if isinstance(a, LogarithmicGrid):
        return bool(a == b)
    return (
        isinstance(b, UniformGrid)
        and a.bits == b.bits
        and torch.equal(a.scale, b.scale)
        and torch.equal(a.offset, b.offset)
    )


def test_grids_and_codes_come_back_as_they_were_written(each: tuple[Quantized, Path]) -> None:
    meant, output = each
    found = read_classifier(output)
    assert [grids.keys() for grids in found.grids] == [grids.keys() for grids in meant.grids]
    for mine, theirs in zip(meant.grids, found.grids, strict=True):
        assert all(same_grid(grid, theirs[place]) for place, grid in mine.items())
    assert found.codes.keys() == meant.codes.keys()
    for name, weight in meant.codes.items():
        assert torch.equal(found.codes[name].codes, weight.codes)
        assert torch.equal(found.codes[name].scales, weight.scales)
        assert found.codes[name].choice == weight.choice


def test_logits_are_those_of_the_evaluation_to_the_bit(each: tuple[Quantized, Path]) -> None:
    meant, output = each
    logits = meant.logits()
    model = load_classifier(output)
    assert type(model).__module__.startswith("transformers.")
    with torch.no_grad():
        assert torch.equal(model(pixel_values=PROBE).logits, logits)
    stored = read_classifier(output)
    assert torch.equal(class_logits(stored.stream, PROBE, stored.variant), logits)
    assert float((logits - class_logits(meant.stream, PROBE, None)).abs().max()) > 0.1
    for places in ({"query", "key", "value", "pattern"}, {"qkv", "up"}, {"o", "down"}):  # each of them counts
        without = tuple({p: grid for p, grid in grids.items() if p not in places} for grids in meant.grids)
        assert not torch.equal(meant.logits(without), logits)


def test_linear_layers_are_integer_arithmetic(vit: tuple[Quantized, Path]) -> None:
    """Against sums of whole numbers in int64, scaled in float32: no bit differs, and they fit 32 bits."""
    meant, output = vit
    model = load_classifier(output)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert layers.keys() == meant.codes.keys()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        model(pixel_values=PROBE)
    for spec in meant.stream.specs:
        if spec.name not in layers:
            continue
        grid, weight = meant.grids[spec.block][spec.input_site], meant.codes[spec.name]
        x, y = (tensor.numpy() for tensor in seen[spec.name])
        s, o = np.float32(grid.scale), np.float32(grid.offset)
        q = np.clip(np.rint((x - o) / s), 0, 2**grid.bits - 1).astype(np.int64)
        W_q, s_w = weight.codes.numpy().astype(np.int64), weight.scales[:, 0].float().numpy()
        bias = meant.stream.source.read(meant.stream.stored(f"{spec.name}.bias")[0]).numpy()
        total = q @ W_q.T
        assert abs(total).max() < 2**31
        shift = o * (s_w * W_q.sum(1).astype(np.float32))
        assert np.array_equal(y, total.astype(np.float32) * (s_w * s) + (bias + shift))


def test_dense_layers_round_their_inputs_only(vit: tuple[Quantized, Path]) -> None:
    meant, output = vit
    spec = meant.stream.specs[DENSE]
    layer = load_classifier(output).get_submodule(spec.name)
    assert isinstance(layer, GridLinear)
    x = torch.randn(5, spec.d_in, generator=torch.Generator().manual_seed(3))
    expected = nn.functional.linear(quantized(x, meant.grids[0]["o"]), meant.stream.weight(spec), layer.bias)
    assert torch.equal(layer(x), expected)


def test_compressed_tensors_reads_its_part_as_it_is_meant(each: tuple[Quantized, Path]) -> None:
    """Its own classes parse the description; transformers loads every tensor; a layer's inputs are on our grid."""
    meant, output = each
    config = QuantizationConfig.model_validate(json.loads((output / "config.json").read_text())["quantization_config"])
    in_form = stored_activations(meant.stream.specs, meant.grids, packed=meant.choices).inputs
    assert {spec.input_site for spec in meant.stream.specs if spec.name in in_form} >= {"qkv", "up"}
    assert {group.input_activations.num_bits for group in config.config_groups.values() if group.input_activations} == {
        grid.bits for grid in in_form.values()
    }
    model, report = AutoModelForImageClassification.from_pretrained(output, output_loading_info=True)
    assert not any(report.values())
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in meant.codes:
        model.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        model.eval()(pixel_values=PROBE)
    for name, weight in meant.codes.items():
        x, y = seen[name]
        inputs, clear = x, torch.ones(x.shape[:-1], dtype=torch.bool)
        if name in in_form:
            grid = in_form[name]
            inputs = quantized(x, grid)
            # half way between two codes either is near: they divide and shift, we shift and divide
            clear = (((x - grid.offset) / grid.scale % 1 - 0.5).abs() > 1e-4).all(-1)
        expected = nn.functional.linear(inputs, weight.dequantize(), model.get_submodule(name).bias)
        torch.testing.assert_close(y[clear], expected[clear], rtol=1e-5, atol=1e-5)
        assert float(clear.float().mean()) > 0.9


def test_weights_alone_run_in_transformers_alone(each: tuple[Quantized, Path], tmp_path: Path) -> None:
    meant, _ = each
    size = meant.write(tmp_path / "out", grids=())
    assert size.activation_bits == 0
    assert not (tmp_path / "out" / TABLE).exists()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    dense = AutoModelForImageClassification.from_pretrained(meant.stream.source.folder).eval()
    with torch.no_grad():
        for name, weight in meant.codes.items():
            dense.get_submodule(name).weight.copy_(weight.dequantize())
        logits = dense(pixel_values=PROBE).logits
        assert torch.equal(model(pixel_values=PROBE).logits, logits)
        assert torch.equal(load_classifier(tmp_path / "out")(pixel_values=PROBE).logits, logits)
    proof = meant.verify(tmp_path / "out", grids=())
    assert (proof.max_abs_difference, proof.transformers_difference, proof.num_grids) == (0.0, 0.0, 0)
    assert proof.in_transformers


def test_proof_is_made_before_it_is_published(each: tuple[Quantized, Path], tmp_path: Path) -> None:
    meant, _ = each
    proofs: list[Any] = []
    meant.write(tmp_path / "out", prove=lambda folder: proofs.append(meant.verify(folder)), max_shard_bytes=9_000)
    (proof,) = proofs
    assert (proof.max_abs_difference, proof.transformers_difference) == (0.0, None)
    assert proof.num_modules == len(meant.codes)
    assert proof.num_grids == sum(map(len, meant.grids))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "out" / "lrpq.json").read_text()) == {"by": "test"}

    def refuse(_: Path) -> None:
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        meant.write(tmp_path / "other", prove=refuse)
    assert not (tmp_path / "other").exists()


def test_size_counts_the_grids(each: tuple[Quantized, Path]) -> None:
    meant, output = each
    activations = stored_activations(meant.stream.specs, meant.grids, packed=meant.choices)
    size = planned_size(meant.stream.source, meant.choices, specs=meant.stream.specs, activations=activations)
    files = [*output.glob("*.safetensors"), output / TABLE]
    assert size.total_bytes == sum(path.stat().st_size for path in files)
    tensors = {name: tensor for name, tensor in load_file(output / "model.safetensors").items() if ".input_" in name}
    assert len(tensors) == 2 * len(activations.inputs)
    stored = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) + (output / TABLE).stat().st_size
    assert size.activation_bits == activations.bits == 8 * stored
    assert size.average_bits == (size.quantized_bits + size.activation_bits) / size.num_quantized_weights
    assert {path.suffix for path in output.iterdir()} == {".safetensors", ".json"}


def with_tensors(change: Callable[[dict[str, Tensor]], None]) -> Change:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


def with_config(change: Callable[[dict[str, Any]], None]) -> Change:
    def changed(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return changed


def with_table(change: Callable[[dict[str, Any]], None]) -> Change:
    """Of a table whose digest is right."""

    def changed(folder: Path) -> None:
        table = json.loads((folder / TABLE).read_text())
        change(table)
        content = json.dumps(table).encode()
        (folder / TABLE).write_bytes(content)
        with_config(lambda config: config["lrpq"]["activations"].update(sha256=digest(content)))(folder)

    return changed


def inputs_of_first_group(**changes: Any) -> Change:
    return with_config(
        lambda config: config["quantization_config"]["config_groups"]["group_0"]["input_activations"].update(changes)
    )


def flip(folder: Path) -> None:
    content = bytearray((folder / TABLE).read_bytes())
    content[60] ^= 1
    (folder / TABLE).write_bytes(bytes(content))


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


QUERY = "vit.encoder.layer.0.attention.attention.query"
DAMAGE: Mapping[str, tuple[Change, str]] = {
    "table missing": (lambda folder: (folder / TABLE).unlink(), r"activations\.json: missing or unreadable"),
    "table a folder": (
        lambda folder: ((folder / TABLE).unlink(), (folder / TABLE).mkdir())[0],
        r"activations\.json: missing or unreadable",
    ),
    "table changed": (flip, r"activations\.json: is not the file that config\.json was written with"),
    "table of a later version": (with_table(lambda t: t.update(version=2)), "no table of activation grids, version 1"),
    "table without blocks": (with_table(lambda t: t.pop("blocks")), "no table of activation grids"),
    "table too short": (with_table(lambda t: t["blocks"].pop()), r"has 1 blocks, the model 2"),
    "a place that leads out": (
        with_table(lambda t: t["blocks"][0].update({"../key": t["blocks"][0]["key"]})),
        r"block 0 has a grid for '\.\./key'",
    ),
    "a step below zero": (with_table(lambda t: t["blocks"][1]["key"].update(scale=-1.0)), "block 1, 'key': .*positive"),
    "a step that is text": (with_table(lambda t: t["blocks"][1]["key"].update(scale="1")), "block 1, 'key': no grid"),
    "no bits": (with_table(lambda t: t["blocks"][0]["value"].update(bits=True)), "block 0, 'value': no grid"),
    "many bits": (with_table(lambda t: t["blocks"][0]["value"].update(bits=40)), "'value': activations of 40 bits"),
    "a grid of no kind": (with_table(lambda t: t["blocks"][0]["value"].update(type="x")), "'value': no grid"),
    "not a number": (with_table(lambda t: t["blocks"][0]["value"].update(offset=float("nan"))), "'value': .*finite"),
    "two grids": (
        with_table(lambda t: t["blocks"][0].update(qkv=t["blocks"][0]["key"])),
        "block 0 has two grids for qkv",
    ),
    "no section": (with_config(lambda c: c.update(lrpq=7)), r"config\.json: 'lrpq' describes no activations"),
    "a later section": (with_config(lambda c: c["lrpq"]["activations"].update(version=3)), "describes no activations"),
    "floating-point inputs": (inputs_of_first_group(type="float"), rf"{QUERY} in .*expected static integers"),
    "dynamic inputs": (inputs_of_first_group(dynamic=True), "expected static integers"),
    "wide inputs": (inputs_of_first_group(num_bits=16), "expected static integers"),
    "no scale": (with_tensors(lambda t: t.pop(f"{QUERY}.input_scale")), rf"{QUERY}\.input_scale: is in no file"),
    "infinite scale": (with_tensors(lambda t: t[f"{QUERY}.input_scale"].mul_(torch.inf)), r"input_scale is not one"),
    "zero point of no code": (with_tensors(lambda t: t[f"{QUERY}.input_zero_point"].fill_(99)), "is no code of 3 bits"),
    "q's inputs are not k's": (
        with_tensors(lambda t: t[f"{QUERY}.input_scale"].mul_(1.25)),
        r"key in .*: its inputs have another grid",
    ),
    "no codes": (
        with_tensors(lambda t: t.pop(f"{QUERY}.weight_packed")),
        r"layers\.0\.attention\.q_proj\.weight is missing",
    ),
    "packed and dense": (
        with_tensors(lambda t: t.update({f"{QUERY}.weight": torch.zeros(32, 32)})),
        rf"{QUERY}\.weight .*is there packed and dense",
    ),
    "no norm": (
        with_tensors(lambda t: t.pop("vit.encoder.layer.1.layernorm_before.bias")),
        r"layers\.1\.layernorm_before\.bias is missing",
    ),
    "cut short": (cut, r"model\.safetensors: missing, truncated or damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(vit: tuple[Quantized, Path], tmp_path: Path, kind: str) -> None:
    change, message = DAMAGE[kind]
    folder = shutil.copytree(vit[1], tmp_path / "out")
    change(folder)
    with pytest.raises(LrpqError, match=message) as caught:
        load_classifier(folder)
    assert "\n" not in str(caught.value)


def other_table(folder: Path) -> None:
    with_table(lambda table: table["blocks"][0]["value"].update(offset=0.25))(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_tensors(lambda t: t["classifier.bias"].add_(1e-6)), r"classifier\.bias .* values differ"),
        (with_tensors(lambda t: t[f"{QUERY}.input_zero_point"].add_(1)), r"input_zero_point .* 1 of 1 values differ"),
        (with_tensors(lambda t: t[f"{QUERY}.weight_packed"].add_(1)), r"weight_packed .* values differ"),
        (other_table, r"activations\.json: is not the table that was meant"),
        (with_config(lambda c: c.update(layer_norm_eps=0.5)), "logits differ"),
    ],
)
def test_what_was_not_meant_is_proved_wrong(
    vit: tuple[Quantized, Path], tmp_path: Path, change: Change, message: str
) -> None:
    meant, output = vit
    change(shutil.copytree(output, tmp_path / "out"))
    with pytest.raises(CheckpointError, match=message):
        meant.verify(tmp_path / "out")


def test_what_cannot_be_computed_is_not_written(vit: tuple[Quantized, Path], tmp_path: Path) -> None:
    meant, output = vit
    spec = meant.stream.specs[0]
    with pytest.raises(QuantizationError, match=rf"{spec.name}: 4b/g16 with quantized inputs"):
        meant.write(tmp_path / "out", choices={**meant.choices, spec.name: Choice(bits=4, group_size=16)})
    by_channel = UniformGrid(bits=4, scale=torch.ones(32), offset=torch.zeros(32))
    with pytest.raises(CheckpointError, match="block 1, qkv: has a step a channel"):
        meant.write(tmp_path / "out", grids=(meant.grids[0], {**meant.grids[1], "qkv": by_channel}))
    activations = stored_activations(meant.stream.specs, meant.grids, packed=meant.choices)
    for format in (CheckpointFormat.DENSE, CheckpointFormat.GPTQ, CheckpointFormat.TRELLIS):
        with pytest.raises(ConfigError, match="stores no quantized activations"):
            write_checkpoint(
                meant.stream.source,
                tmp_path / "out",
                quantized=meant.codes.__getitem__,
                choices={name: Choice(bits=4, group_size=-1) for name in meant.choices},
                specs=meant.stream.specs,
                manifest={},
                format=format,
                activations=activations,
            )
    assert not (tmp_path / "out").exists()
    model = load_classifier(output).to(torch.bfloat16)
    with pytest.raises(QuantizationError, match="give load_classifier the dtype"):
        model(pixel_values=PROBE.bfloat16())


def test_other_dtypes_are_asked_for(vit: tuple[Quantized, Path]) -> None:
    _, output = vit
    model = load_classifier(output, dtype=torch.float64)
    with torch.no_grad():
        logits = model(pixel_values=PROBE.double()).logits
    assert logits.dtype == torch.float64
    assert bool(torch.isfinite(logits).all())


def test_only_classifiers_are_loaded(vit: tuple[Quantized, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the configuration of a packed checkpoint"):
        load_classifier(vit[0].stream.source.folder)
    source = ModelSource(write_tiny(tmp_path / "llama", "llama"))
    name = "model.layers.0.mlp.up_proj"
    choice = Choice(bits=4, group_size=-1)
    write_checkpoint(
        source,
        tmp_path / "out",
        quantized=lambda _: round_to_nearest(source.read(f"{name}.weight").float(), choice),
        choices={name: choice},
        manifest={},
    )
    with pytest.raises(CheckpointError, match="expected an image classifier"):
        load_classifier(tmp_path / "out")


def test_what_transformers_cannot_load_is_known_before() -> None:
    """Its rule for DINOv2 cuts a tensor in two; if this fails, it may load packed layers now: compare them again."""
    with torch.device("meta"):
        vit, dino = ViTForImageClassification(ViTConfig()), Dinov2ForImageClassification(Dinov2Config())
    assert loads_packed(vit)
    assert not loads_packed(dino)
