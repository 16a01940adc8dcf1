"""What fuzzing has found, each as the plain case that it comes down to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.config_file import load_config
from flows.manifest_file import read_manifest_file
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.errors import CalibrationError, CheckpointError, ConfigError, ModelError, StoreError
from lrpq.model.safetensors_source import ModelSource
from tasks.calibration.sources import ParquetSource
from tasks.calibration.token_rows import token_column
from tasks.store import thrift
from tasks.store.documents import SCHEMA_VERSION, canonical_text, parse_document, sha256_text
from tasks.store.schema import sealed
from tasks.store.symmetric import read_symmetric, symmetric_index
from tasks.store.tables import read_table, units_of
from tasks.store.tensors import read_tensors

from . import artefacts, parquet
from .readers import READERS_BY_NAME

DEEP = "[" * 100_000 + "]" * 100_000
INDEX = "model.safetensors.index.json"
MODULE = "model.layers.0.mlp.down_proj"


def refused(kind: type[Exception], match: str, read: Callable[[], object]) -> None:
    """The error is of the kind, fits the pattern and is one printable line."""
    with pytest.raises(kind, match=match) as caught:
        read()
    assert str(caught.value).isprintable()


# ---- models --------------------------------------------------------------------------------------


def shard_with(folder: Path, header: str, content: bytes = b"") -> None:
    artefacts.write_single(folder)
    text = header.encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)


@pytest.mark.parametrize("shape", [[0, 2**63], [2**62, 4, 0], [1, 0, *[1] * 63]])
def test_a_shape_without_elements_that_torch_does_not_take(tmp_path: Path, shape: list[int]) -> None:
    shard_with(tmp_path, json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}))
    refused(ModelError, r"model\.safetensors: truncated or corrupt \(", lambda: ModelSource(tmp_path))


def test_a_tensor_that_is_described_twice(tmp_path: Path) -> None:
    entries = [f'"a":{{"dtype":"F32","shape":[{n}],"data_offsets":[{a},{b}]}}' for n, a, b in ((1, 0, 4), (2, 0, 8))]
    shard_with(tmp_path, "{" + ",".join(entries) + "}", bytes(8))
    refused(ModelError, "truncated or corrupt", lambda: ModelSource(tmp_path))


def test_a_tensor_name_that_would_reach_the_terminal(tmp_path: Path) -> None:
    shard_with(tmp_path, json.dumps({"\x1b[2J": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}))
    refused(ModelError, r"tensor name '\\x1b\[2J'", lambda: ModelSource(tmp_path))


def test_a_shard_without_tensors(tmp_path: Path) -> None:
    shard_with(tmp_path, "{}")
    refused(ModelError, "holds no tensors", lambda: ModelSource(tmp_path))


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    artefacts.write_single(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    refused(ModelError, "missing", lambda: ModelSource(tmp_path))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (DEEP, "not a safetensors index"),
        ("{}", "names no tensors"),
        ('{"a": null}', r"tensor 'a' is in None"),
        ('{"a": ".."}', "leaves the model folder"),
        ('{"a": "../outside/canary.safetensors"}', "leaves the model folder"),
        ('{"a": "/etc/passwd"}', "leaves the model folder"),
        ('{"a\\u001b": "x"}', r"tensor 'a\\x1b'"),
        ('{"a": "x\\u0000.safetensors"}', "expected printable names"),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, weight_map: str, message: str) -> None:
    artefacts.write_sharded(tmp_path)
    (tmp_path / INDEX).write_text(f'{{"weight_map": {weight_map}}}')
    refused(ModelError, f"{INDEX}: .*{message}", lambda: ModelSource(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 10**9}, "num_labels is 1000000000, expected 10000 at most"),
        ({"model_type": "qwen2", "num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"vision_config": {"depths": [1, 10**9]}}, "depths is 1000000000"),
        ({"architectures": 5}, "architectures is no list of names"),
        ({"architectures": ["Llama\x1b"]}, "architectures is no list of names"),
    ],
)
def test_a_configuration_that_would_fill_the_memory_or_that_names_nothing(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    artefacts.write_single(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**artefacts.LLAMA, **change}))
    refused(ModelError, rf"config\.json: .*{message}", lambda: ModelSource(tmp_path))


def test_a_configuration_that_is_nested_too_deeply(tmp_path: Path) -> None:
    artefacts.write_single(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"model_type": "llama", "x": {DEEP}}}')
    refused(ModelError, r"config\.json: not a configuration", lambda: ModelSource(tmp_path))


# ---- written checkpoints -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("written") / "checkpoint"
    READERS_BY_NAME["checkpoint"].write[0](folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def checkpoint(written: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    "names", ["[null]", '["..", "x"]', '["../outside/canary.safetensors"]', '["x\\u0000"]', '["a", 3]', "[[]]", DEEP]
)
def test_a_checkpoint_index_that_is_none(checkpoint: Path, names: str) -> None:
    shards = names if names == DEEP else ",".join(f'"{i}":{json.dumps(n)}' for i, n in enumerate(json.loads(names)))
    (checkpoint / INDEX).write_text(f'{{"weight_map": {{{shards}}}}}' if names != DEEP else names)
    refused(CheckpointError, f"{INDEX}: ", lambda: StoredCheckpoint(checkpoint))


@pytest.mark.parametrize(
    "change",
    [
        {"num_bits": math.inf},
        {"num_bits": True},
        {"num_bits": 0},
        {"num_bits": 2**40},
        {"strategy": "group", "group_size": 0},
        {"strategy": "group", "group_size": 1.5},
        {"strategy": "tensor"},
        {"symmetric": False},
        {"type": "float"},
    ],
)
def test_weights_that_the_format_does_not_have(checkpoint: Path, change: dict[str, Any]) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"] |= change
    path.write_text(json.dumps(config))
    refused(CheckpointError, r"config\.json: not the configuration", lambda: StoredCheckpoint(checkpoint))


@pytest.mark.parametrize("target", ["re:^(a+)+$", "re:^([a-z_.]|[a-z0-9_.])*!$", "re:.*.*.*.*x", "(" * 5000, 3])
def test_a_pattern_that_would_never_end(checkpoint: Path, target: object) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    next(iter(config["quantization_config"]["config_groups"].values()))["targets"] = [target]
    path.write_text(json.dumps(config))
    refused(CheckpointError, r"config\.json: not the configuration", lambda: StoredCheckpoint(checkpoint))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("weight_shape", torch.tensor([32]), "has the shape"),
        ("weight_shape", torch.tensor(32), "0 dimensions"),
        ("weight_shape", torch.tensor([-32, 32]), "has the shape"),
        ("weight_shape", torch.tensor([32, 2**62]), "is no 8b/g32 layer"),
        ("weight_shape", torch.tensor([32.0, math.nan]), "is F32"),
        ("weight_packed", torch.zeros(32, 8), "is F32 with 2 dimensions, expected I32 with 2"),
        ("weight_packed", torch.zeros(32, dtype=torch.int32), "with 1 dimensions"),
        ("weight_scale", torch.full((32, 1), math.nan, dtype=torch.bfloat16), "a scale is not finite"),
        ("weight_scale", torch.full((32, 1), 3e38, dtype=torch.bfloat16), "a scale is not finite"),
    ],
)
def test_a_part_of_a_module_that_cannot_be_its(checkpoint: Path, part: str, values: torch.Tensor, message: str) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[f"{MODULE}.{part}"] = values
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused(CheckpointError, f"{MODULE}.*{message}", lambda: StoredCheckpoint(checkpoint).codes(MODULE))


def test_a_dense_weight_that_is_not_finite(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    READERS_BY_NAME["checkpoint-dense"].write[0](folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{MODULE}.weight"][0, 0] = math.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    spec = next(spec for spec in artefacts.LINEARS if spec.name == MODULE)
    refused(
        CheckpointError,
        f"{MODULE}.*a weight is not finite",
        lambda: StoredCheckpoint(folder).weight(spec, torch.float32),
    )


# ---- the store -----------------------------------------------------------------------------------


def with_footer_text(path: Path, key: bytes, change: Callable[[bytes], bytes], *, new_key: bytes = b"") -> None:
    """Change an entry of a Parquet file's metadata."""
    footer, start = parquet.read_footer(path.read_bytes())
    for entry in thrift.field(footer, parquet.KEY_VALUES)[2][1]:
        name, value = thrift.field(entry, 1), thrift.field(entry, 2)
        if name[2] == key:
            name[2], value[2] = new_key or key, change(value[2])
    path.write_bytes(parquet.with_footer(path.read_bytes()[:start], footer))


def test_metadata_that_no_checksum_covers_is_not_given_out(tmp_path: Path) -> None:
    artefacts.write_costs(tmp_path)
    expected = read_table(artefacts.store_of(tmp_path), artefacts.TABLE, "costs")
    with_footer_text(tmp_path / artefacts.TABLE, b"ARROW:schema", lambda text: text, new_key=b"foreign")
    found = read_table(artefacts.store_of(tmp_path), artefacts.TABLE, "costs")
    assert found.schema.metadata == expected.schema.metadata
    assert units_of(found) == {"cost": "nats"}


def test_the_name_of_a_list_element_is_as_it_was_written(tmp_path: Path) -> None:
    artefacts.write_windows(tmp_path)
    path = tmp_path / artefacts.TABLE
    table = pq.read_table(path)
    named = pa.list_(pa.field("element\x1b", pa.int64()))
    pq.write_table(
        table.cast(pa.schema([("tokens", named)], metadata=table.schema.metadata)),
        path,
        use_compliant_nested_type=False,
    )
    refused(
        StoreError,
        "its column 'tokens' is of type",
        lambda: read_table(artefacts.store_of(tmp_path), artefacts.TABLE, "costs"),
    )


def test_what_a_parser_quotes_does_not_reach_the_terminal(tmp_path: Path) -> None:
    artefacts.write_costs(tmp_path)
    path = tmp_path / artefacts.TABLE
    raw = bytearray(path.read_bytes())
    start = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    raw[start] = 0x1F  # a field of no type: the parser shows the byte
    path.write_bytes(raw)
    refused(StoreError, "is damaged", lambda: read_table(artefacts.store_of(tmp_path), artefacts.TABLE, "costs"))


@pytest.mark.parametrize(
    "entries",
    [
        "3",
        "[3]",
        "{}",
        '[{"name": "qkv"}]',
        '[{"name": "qkv", "width": true, "scalars": {}}]',
        '[{"name": "qkv", "width": 0, "scalars": {}}]',
        '[{"name": "qkv", "width": 1000000000, "scalars": {}}]',
        '[{"name": "qkv", "width": 9007199254740992, "scalars": {}}]',
        '[{"name": "o", "width": 2, "scalars": {}}, {"name": "qkv", "width": 9007199254740992, "scalars": {}}]',
        '[{"name": "qkv", "width": 9007199254740992, "scalars": {}, "band": [1, 2, 2]}]',
        '[{"name": "qkv", "width": 6, "scalars": {}, "band": [2, 2, 2]}, {"name": "o", "width": 2, "scalars": {}}]',
        '[{"name": "qkv", "width": 6, "scalars": {}, "band": [true, 2, 2]}, {"name": "o", "width": 2, "scalars": {}}]',
        '[{"name": "qkv", "width": 6, "scalars": {}, "band": [0, 3, 2]}, {"name": "o", "width": 2, "scalars": {}}]',
        '[{"name": "qkv", "width": 6, "scalars": {}, "band": [0, 1, 65]}, {"name": "o", "width": 2, "scalars": {}}]',
        '[{"name": "qkv", "width": 6, "scalars": {}, "band": [0, 2]}, {"name": "o", "width": 2, "scalars": {}}]',
        '[{"name": "qkv", "width": 6, "scalars": {}, "band": [0, 2, 2, 0]}, {"name": "o", "width": 2, "scalars": {}}]',
        '[{"name": "qkv", "width": 6, "scalars": {"tokens": "5"}}]',
        '[{"name": "qkv", "width": 6, "scalars": {"tokens": NaN}}]',
        '[{"name": "qkv", "width": 6, "scalars": {}}, {"name": "qkv", "width": 2, "scalars": {}}]',
        DEEP,
    ],
)
def test_an_index_of_matrices_with_a_checksum_that_fits(tmp_path: Path, entries: str) -> None:
    artefacts.write_hessians(tmp_path)
    path = tmp_path / artefacts.SYMMETRIC
    file = pq.ParquetFile(path)
    metadata = {name.decode(): text.decode() for name, text in file.schema_arrow.metadata.items()}
    metadata.pop("lrpq.sha256")
    schema = sealed(file.schema_arrow, {**metadata, "lrpq.matrices": entries})
    groups = [file.read_row_group(group).cast(schema) for group in range(file.num_row_groups)]
    with pq.ParquetWriter(path, schema) as writer:
        for group in groups:
            writer.write_table(group)
    refused(StoreError, "is damaged", lambda: symmetric_index(artefacts.store_of(tmp_path), artefacts.SYMMETRIC))
    refused(StoreError, "is damaged", lambda: read_symmetric(artefacts.store_of(tmp_path), artefacts.SYMMETRIC, "qkv"))


@pytest.mark.parametrize("shape", [[0, 2**63], [2**62, 4, 0], [1, 0, *[1] * 63], [True, 0]])
def test_a_stored_shape_without_elements_that_torch_does_not_take(tmp_path: Path, shape: list[int]) -> None:
    metadata = {"lrpq.schema": str(SCHEMA_VERSION), "lrpq.key": "t.safetensors", "sha256:a": sha256_text("")}
    header: dict[str, Any] = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}, "__metadata__": metadata}
    metadata["lrpq.sha256"] = sha256_text(canonical_text(header))
    text = json.dumps(header).encode()
    (tmp_path / "t.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    refused(
        StoreError,
        "entry of tensor 'a' is malformed",
        lambda: read_tensors(artefacts.store_of(tmp_path), "t.safetensors"),
    )


@pytest.mark.parametrize("depth", [960, 980, 990, 1000, 200_000])
def test_a_document_of_any_depth(depth: int) -> None:
    opening = f'{{"key":"r/run.json","kind":"run","schema":{SCHEMA_VERSION},"sha256":"","body":{{"x":'
    raw = opening + "[" * depth + "]" * depth + "}}"
    refused(ValueError, "checksum|nested too deeply", lambda: parse_document(raw.encode(), "run", key="r/run.json"))


# ---- calibration and the command line ------------------------------------------------------------


def test_a_column_whose_name_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"tokens": [[1]]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"tokens", b"token\xff"))
    refused(CalibrationError, "not a readable Parquet file", lambda: token_column(ParquetSource(location=str(path))))


@pytest.mark.parametrize("text", [DEEP, f'{{"a": {DEEP}}}', '{"a": NaN}', '{"a": 1, "a": 2}', "[]", "\xff"])
def test_a_manifest_file_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lrpq.json"
    path.write_text(text, encoding="latin-1")
    refused(CheckpointError, r"lrpq\.json: not a manifest", lambda: read_manifest_file(path))


def test_a_device_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "lrpq.json").symlink_to("/dev/zero")
    refused(CheckpointError, r"lrpq\.json: not a manifest", lambda: read_manifest_file(tmp_path / "lrpq.json"))
    (tmp_path / "none.json").symlink_to(tmp_path / "missing")
    assert read_manifest_file(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (f"x = {DEEP}", r"c\.toml: not valid TOML"),
        ("[run]\nmodel = 'a/b'\nseed = 0x" + "f" * 5000, r"c\.toml: a number too long"),
        ("[plan]\nkeep = " + "[" * 300 + "]" * 300, r"c\.toml: lists too deep"),
        (
            '[run]\nmodel = "a/b"\nseed = "\\u001b[2J\\u2028"',
            r'run\.seed: expected an integer, got "\\u001b\[2J\\u2028"',
        ),
    ],
)
def test_a_configuration_file_that_is_none(tmp_path: Path, settings: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(settings)
    refused(ConfigError, message, lambda: load_config(path, {"plan": {"budget_bits": 4.25}, "output": "out"}))


def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"run": {"model": "\\ud800"}, "plan": {"budget_bits": 4.25}, "output": "out"}')
    refused(ConfigError, r"c\.json: .*no Unicode", lambda: load_config(path, {}))


def test_a_folder_of_an_unknown_user_is_a_folder_of_that_name(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("output = '~nobody-here/out'\n[run]\nmodel = 'a/b'\n[plan]\nbudget_bits = 4.25\n")
    assert load_config(path, {}).output == Path.cwd() / "~nobody-here" / "out"
