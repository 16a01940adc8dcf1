"""Every reader of bytes from outside: how a valid artefact is made, which of its files are changed, what is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from flows.config_file import load_config
from flows.manifest_file import read_manifest_file, write_manifest_file
from lrpq.checkpoint.assemble import write_checkpoint
from lrpq.checkpoint.formats import CheckpointFormat
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.quant.rtn import round_to_nearest
from tasks.calibration.documents import load_documents
from tasks.calibration.sources import ParquetSource, TextSource
from tasks.calibration.token_rows import read_token_windows, token_column
from tasks.store.local import LocalStore
from tasks.store.manifest import StageManifest, claim_run, read_manifest, read_run, write_manifest
from tasks.store.objects import ObjectRecord
from tasks.store.symmetric import symmetric_index
from tasks.store.tables import read_table, units_of, write_table
from tasks.store.tensors import read_metadata, read_symmetric, read_tensors, write_symmetric, write_tensors

from .mutators import LINKS, LINKS_OUT

Found = dict[str, str]
"""What was read: name -> text or digest, so that two readings can be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """One way in."""

    name: str
    write: tuple[Callable[[Path], object], ...]
    """Each makes a valid artefact in an empty folder."""
    read: Callable[[Path], Found]
    """Reads all of the artefact in a folder."""
    roles: Mapping[str, str]
    """Files that are changed -> their format (mutators.BY_ROLE)."""
    links: Sequence[str] = ()
    """Where links that take a file's place point; none leaves the folder alone. Those of a model may lead out of it,
    for the hub's cache consists of such links."""
    protected: bool = False
    """Whether checksums must tell every change of what is read."""
    names_file: bool = True
    """Whether each refusal must name a file or the folder."""


def digest(content: bytes | Tensor) -> str:
    """Of bytes; of a tensor its dtype, shape and bytes."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    raw = content.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{content.dtype} {list(content.shape)} {digest(raw)}"


# ---- models --------------------------------------------------------------------------------------


LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 32,
    "max_position_embeddings": 64, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "bos_token_id": 1, "eos_token_id": [2, 3], "dtype": "float32", "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
}  # fmt: skip
CONFIGURED = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "phi3",
        "opt",
        "gpt_neox",
        "gpt_bigcode",
    ),
    *("mixtral", "qwen3_moe", "gpt2", "deepseek_v3", "llava", "bert", "t5"),
)
"""Those that are supported, and some others."""


def _write_tensors(path: Path, *, seed: int = 0, prefix: str = "") -> list[str]:
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        f"{prefix}a.weight": torch.randn(4, 3, generator=rng),
        f"{prefix}b.weight": torch.randn(2, 2, 2, generator=rng).bfloat16(),
        f"{prefix}norm.weight": torch.randn(5, generator=rng).half(),
        f"{prefix}scale": torch.randn((), generator=rng, dtype=torch.float64),
        f"{prefix}empty": torch.zeros(0, 7),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return sorted(tensors)


def _write_config(folder: Path, config: Mapping[str, Any] = LLAMA) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_single(folder: Path) -> None:
    _write_config(folder)
    _write_tensors(folder / "model.safetensors")


def write_sharded(folder: Path) -> None:
    _write_config(folder)
    shards = {f"model-0000{i}-of-00002.safetensors": f"model.layers.{i}." for i in (1, 2)}
    weight_map = {
        name: shard
        for number, (shard, prefix) in enumerate(shards.items())
        for name in _write_tensors(folder / shard, seed=number, prefix=prefix)
    }
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_gpt2(folder: Path) -> None:
    config = GPT2Config(n_embd=8, n_head=2, n_layer=1, n_positions=8, vocab_size=16, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)


def _writes_config_of(model_type: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        _write_tensors(folder / "model.safetensors")
        _write_config(folder, AutoConfig.for_model(model_type).to_dict())

    return write


def read_model(folder: Path) -> Found:
    source = open_source(folder)
    found = {}
    for name in source.names():
        tensor = source.read(name)
        assert tensor.shape == source.shape(name)
        assert tensor.dtype == source.dtype(name)
        assert tensor.numel() * tensor.itemsize == source.nbytes(name)
        found[name] = digest(tensor)
    return found


def read_config(folder: Path) -> Found:
    config = ModelSource(folder).config
    plain = {name: value for name, value in vars(config).items() if isinstance(value, bool | int | float | str | list)}
    return {"config": f"{type(config).__name__} {plain}"}


CHOICES = {
    "model.layers.0.self_attn.q_proj": Choice(bits=3, group_size=16),
    "model.layers.0.self_attn.o_proj": Choice(bits=4, group_size=-1),
    "model.layers.0.mlp.down_proj": Choice(bits=8, group_size=32),
}


LINEARS = tuple(
    LinearSpec(name=name, block=0, d_out=32, d_in=32, input_site="x", fused_group=name)
    for name in (*CHOICES, "model.layers.0.mlp.up_proj")
)


def _writes_checkpoint(
    *, max_shard_bytes: int = 10**9, format: CheckpointFormat = CheckpointFormat.COMPRESSED_TENSORS
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        torch.manual_seed(0)
        model = folder.with_name("original")
        LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(model)
        source = ModelSource(model)
        write_checkpoint(
            source,
            folder,
            quantized=lambda name: round_to_nearest(source.read(f"{name}.weight"), CHOICES[name]),
            choices=CHOICES,
            manifest={},
            format=format,
            max_shard_bytes=max_shard_bytes,
        )

    return write


def read_checkpoint(folder: Path) -> Found:
    checkpoint = StoredCheckpoint(folder)
    found = {}
    for name in (*checkpoint.modules(), "model.layers.0.self_attn.k_proj", "lm_head"):
        weight = checkpoint.codes(name)
        if weight is not None:
            low, high = -(1 << (weight.choice.bits - 1)), (1 << (weight.choice.bits - 1)) - 1
            assert weight.codes.dtype == torch.int8
            assert low <= int(weight.codes.min()) <= int(weight.codes.max()) <= high
            found[name] = f"{weight.choice} {digest(weight.codes)} {digest(weight.scales)}"
    for spec in LINEARS:
        dense = checkpoint.weight(spec, torch.float32)
        if dense is not None:
            assert dense.shape == (spec.d_out, spec.d_in)
            assert bool(torch.isfinite(dense).all())
            found[f"{spec.name}.weight"] = digest(dense)
    return found


# ---- the store -----------------------------------------------------------------------------------


def _store(folder: Path) -> LocalStore:
    return LocalStore(root=folder.resolve(), url=str(folder))


def _writable(folder: Path) -> LocalStore:
    (folder / "~temporary").mkdir()
    return _store(folder)


TABLE, SYMMETRIC, TENSORS, MANIFEST, RUN = "r/t.parquet", "r/h.parquet", "r/t.safetensors", "r/m.json", "r/run.json"


def write_costs(folder: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {
        "name": [f"model.layers.{row // 3}.q_proj" for row in range(40)],
        "cost": rng.standard_normal(40),
        "maybe": [None if row % 5 == 0 else row for row in range(40)],
        "ragged": [list(range(row % 4)) for row in range(40)],
        "flag": [row % 3 == 0 for row in range(40)],
        "raw": [bytes([row]) * (row % 5) for row in range(40)],
    }
    write_table(_writable(folder), TABLE, columns, units={"cost": "nats"}, kind="costs")


def write_windows(folder: Path) -> None:
    rows = pa.array(list(np.arange(48).reshape(4, 12)), type=pa.list_(pa.int64()))
    write_table(_writable(folder), TABLE, pa.table({"tokens": rows}), units={}, kind="costs")


def read_costs(folder: Path) -> Found:
    table = read_table(_store(folder), TABLE, "costs")
    return {"units": repr(units_of(table)), "table": repr(table.to_pydict()), "schema": str(table.schema)}


def write_hessians(folder: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    square = torch.randn(6, 6, generator=rng)
    matrices = {"qkv": square @ square.T, "o": torch.eye(2)}
    write_symmetric(_writable(folder), SYMMETRIC, matrices, {"qkv": {"tokens": 5, "weight": 0.25}})


def read_hessians(folder: Path) -> Found:
    store = _store(folder)
    index = symmetric_index(store, SYMMETRIC)
    found = {"index": repr(index)}
    for name, width in index.widths.items():
        matrix, scalars = read_symmetric(store, SYMMETRIC, name)
        assert matrix.shape == (width, width)
        found[name] = f"{digest(matrix)} {scalars}"
    return found


def write_codes(folder: Path) -> None:
    content = {
        "codes": torch.arange(-6, 6, dtype=torch.int8).reshape(3, 4),
        "scales": torch.ones(3, 1, dtype=torch.bfloat16),
        "flag": torch.tensor(True),
        "none": torch.zeros(0, 3),
        "float8": torch.ones(4).to(torch.float8_e4m3fn),
    }
    write_tensors(_writable(folder), TENSORS, content, {"bits": "3", "module": "q_proj"})


def read_codes(folder: Path) -> Found:
    store = _store(folder)
    tensors = {name: digest(tensor) for name, tensor in read_tensors(store, TENSORS).items()}
    return {"metadata": repr(sorted(read_metadata(store, TENSORS).items())), **tensors}


def write_stage(folder: Path) -> None:
    store = _writable(folder)
    store.publish("r/o", lambda file: file.write(b"1234") and None)
    manifest = StageManifest(
        stage="profile",
        key="k" * 64,
        inputs={"windows": "a" * 64},
        parameters={"bits": [2, 3], "damping": 0.01, "nested": {"x": None, "y": True}},
        environment={"torch": "2"},
        code="c" * 64,
        objects={"r/o": ObjectRecord(num_bytes=4, sha256="0" * 64)},
        seconds=1.5,
        created="2026-11-22T06:30:00+00:00",
    )
    write_manifest(store, MANIFEST, manifest)


def read_stage(folder: Path) -> Found:
    return {"manifest": repr(read_manifest(_store(folder), MANIFEST))}


def write_run(folder: Path) -> None:
    claim_run(_writable(folder), "r", {"budget": 3.25, "model": "m", "files": ["a", None, True], "n": {"a": {"b": 1}}})


def read_stored_run(folder: Path) -> Found:
    return {"run": repr(read_run(_store(folder), "r"))}


# ---- calibration ---------------------------------------------------------------------------------


TEXT_PARQUET, TEXT, ROWS = "t.parquet", "t.txt", "t.jsonl"
TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]


def _writes_parquet(columns: Mapping[str, Any], **options: Any) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(pa.table(dict(columns)), folder / TEXT_PARQUET, **options)


def _ids(kind: pa.DataType) -> pa.Array:
    return pa.array([[(row * 7 + i) % 100 for i in range(8)] for row in range(20)], kind)


def read_token_rows(folder: Path) -> Found:
    source = ParquetSource(location=str(folder / TEXT_PARQUET))
    column = token_column(source)
    if column is None:
        return {"column": "None"}
    windows = read_token_windows(
        source, column=column, vocab_size=100, num_windows=2, length=8, seed=0, placement="random"
    )
    assert int(windows.tokens.min()) >= 0
    assert int(windows.tokens.max()) < 100
    return {"tokens": digest(windows.tokens)}


def _documents(source: ParquetSource | TextSource) -> Found:
    documents = list(load_documents(source))
    for document in documents:  # what a tokenizer is given must be Unicode
        for text in [document] if isinstance(document, str) else [part for turn in document for part in turn.values()]:
            str(text).encode()
    return {"documents": repr(documents)}


def read_parquet_documents(folder: Path) -> Found:
    return _documents(ParquetSource(location=str(folder / TEXT_PARQUET)))


def write_text(folder: Path) -> None:
    (folder / TEXT).write_text("première ligne\nzweite Zeile ☃\n\n最後 😀\n" * 3, encoding="utf-8")


def write_rows(folder: Path) -> None:
    rows = [{"id": 1, "text": "Hello"}, {"id": 2, "text": "é ☃"}, {"id": 3, "text": "", "more": [1, {"a": None}]}]
    (folder / ROWS).write_text("\n".join(map(json.dumps, rows)) + "\n")


def write_talk(folder: Path) -> None:
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": [{"type": "text", "text": "Yes"}]}]
    (folder / ROWS).write_text("\n".join(json.dumps({"messages": talk}) for talk in (TALK, shared, TALK)) + "\n")


def read_text(folder: Path) -> Found:
    return _documents(TextSource(location=str(folder / TEXT)))


def read_rows(folder: Path) -> Found:
    return _documents(TextSource(location=str(folder / ROWS)))


# ---- the command line ----------------------------------------------------------------------------


SETTINGS: Mapping[str, Any] = {
    "output": "out", "store": "store", "overwrite": False, "run_id": "a-run",
    "run": {
        "model": "owner/name", "relevance": "blend", "relevance_floor": 0.03, "seed": 1, "threads": 2,
        "calibration": {"source": "text:a.txt", "num_windows": 4, "length": 64, "text_column": "text"},
        "candidates": {"bits": [3, 4, 8], "group_sizes": [64, -1], "damping": 0.01, "grid": "signed"},
    },
    "plan": {"budget_bits": 4.25, "keep": ["lm_head=16", "model.layers.0.*=8"], "target": "vllm", "correction": 0.5},
    "evaluation": {"source": "text:b.txt", "num_windows": 2, "length": 32, "control": True},
    "cluster": {"workers": 2, "device": "cpu"},
}  # fmt: skip


def write_settings_json(folder: Path) -> None:
    (folder / "c.json").write_text(json.dumps(SETTINGS, indent=1))


def write_settings_toml(folder: Path) -> None:
    lines: list[str] = []

    def section(values: Mapping[str, Any], name: str) -> None:
        lines.extend([f"[{name}]"] if name else [])
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, Mapping))
        for key, value in values.items():
            if isinstance(value, Mapping):
                section(value, f"{name}.{key}" if name else key)

    section(SETTINGS, "")
    (folder / "c.toml").write_text("\n".join(lines) + "\n")


def _reads_settings(file: str) -> Callable[[Path], Found]:
    return lambda folder: {"config": load_config(folder / file, {}).model_dump_json()}


def write_lrpq_json(folder: Path) -> None:
    size = {"total_bytes": 10, "average_bits": 3.25}
    manifest = {"run_id": "r", "content_key": "a" * 64, "size": size, "configuration": {"plan": {"budget_bits": 3.25}}}
    write_manifest_file(folder / "lrpq.json", manifest)


def read_lrpq_json(folder: Path) -> Found:
    return {"manifest": repr(read_manifest_file(folder / "lrpq.json"))}


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
TOKEN_PARQUET = (
    _writes_parquet({"tokens": _ids(pa.list_(pa.int64()))}, compression="none", use_dictionary=False),
    _writes_parquet({"text": ["a"] * 20, "input_ids": _ids(pa.list_(pa.int32(), 8))}, row_group_size=7),
    _writes_parquet({"tokens": _ids(pa.large_list(pa.uint16()))}, compression="zstd", data_page_version="2.0"),
    _writes_parquet({"tokens": _ids(pa.list_(pa.int32()))}, compression="gzip", column_encoding="DELTA_BINARY_PACKED",
                    use_dictionary=False, write_page_checksum=True),
)  # fmt: skip
DATES = pa.array([i * 86_400 * 10**9 for i in range(20)], pa.timestamp("ns", tz="UTC"))
TEXT_PARQUET_WRITERS = (
    _writes_parquet({"id": range(20), "text": ["Hello ☃" * (i % 3) for i in range(20)]}, compression="none"),
    _writes_parquet({"messages": [TALK] * 20, "n": pa.array([{"a": [1, 2]}] * 20)}, data_page_version="2.0"),
    _writes_parquet(
        {"when": DATES, "day": pa.array(range(20), pa.date32()), "price": pa.array(range(20), pa.decimal128(20, 3)),
         "map": pa.array([[("k", 1)]] * 20, pa.map_(pa.string(), pa.int8())), "text": ["a b"] * 20},
        compression="zstd", row_group_size=8,
    ),
)  # fmt: skip

READERS = (
    Reader(
        name="model",
        write=(write_single,),
        read=read_model,
        roles={"model.safetensors": "safetensors"},
        links=LINKS,
    ),
    Reader(
        name="model-index",
        write=(write_sharded,),
        read=read_model,
        roles={INDEX: "json", SHARDS[0]: "safetensors"},
        links=LINKS,
    ),
    Reader(
        name="model-config",
        write=tuple(_writes_config_of(kind) for kind in CONFIGURED),
        read=read_config,
        roles={"config.json": "json"},
    ),
    Reader(
        name="model-gpt2",
        write=(write_gpt2,),
        read=read_model,
        roles={"config.json": "json", "model.safetensors": "safetensors"},
    ),
    Reader(
        name="checkpoint",
        write=(
            _writes_checkpoint(),
            _writes_checkpoint(format=CheckpointFormat.GPTQ),
        ),
        read=read_checkpoint,
        roles={"config.json": "json", "model.safetensors": "safetensors"},
        links=LINKS,
    ),
    Reader(
        name="checkpoint-dense",
        write=(_writes_checkpoint(format=CheckpointFormat.DENSE),),
        read=read_checkpoint,
        roles={"config.json": "json", "model.safetensors": "safetensors"},
        links=LINKS,
    ),
    Reader(
        name="checkpoint-index",
        write=(_writes_checkpoint(max_shard_bytes=5_000),),
        read=read_checkpoint,
        roles={INDEX: "json", "model-00002-of-00004.safetensors": "safetensors"},
        links=LINKS,
    ),
    Reader(
        name="store-table",
        write=(write_costs, write_windows),
        read=read_costs,
        roles={TABLE: "parquet"},
        links=LINKS_OUT,
        protected=True,
    ),
    Reader(
        name="store-symmetric",
        write=(write_hessians,),
        read=read_hessians,
        roles={SYMMETRIC: "parquet"},
        links=LINKS_OUT,
        protected=True,
    ),
    Reader(
        name="store-tensors",
        write=(write_codes,),
        read=read_codes,
        roles={TENSORS: "safetensors"},
        links=LINKS_OUT,
        protected=True,
    ),
    Reader(
        name="store-manifest",
        write=(write_stage,),
        read=read_stage,
        roles={MANIFEST: "json"},
        links=LINKS_OUT,
        protected=True,
    ),
    Reader(
        name="store-run",
        write=(write_run,),
        read=read_stored_run,
        roles={RUN: "json"},
        links=LINKS_OUT,
        protected=True,
    ),
    Reader(
        name="resealed-symmetric", write=(write_hessians,), read=read_hessians, roles={SYMMETRIC: "sealed-matrices"}
    ),
    Reader(name="resealed-tensors", write=(write_codes,), read=read_codes, roles={TENSORS: "sealed-tensors"}),
    Reader(name="resealed-manifest", write=(write_stage,), read=read_stage, roles={MANIFEST: "sealed-json"}),
    Reader(name="token-rows", write=TOKEN_PARQUET, read=read_token_rows, roles={TEXT_PARQUET: "parquet"}),
    Reader(
        name="parquet-documents",
        write=TEXT_PARQUET_WRITERS,
        read=read_parquet_documents,
        roles={TEXT_PARQUET: "parquet"},
    ),
    Reader(name="text", write=(write_text,), read=read_text, roles={TEXT: "text"}),
    Reader(name="jsonl", write=(write_rows, write_talk), read=read_rows, roles={ROWS: "jsonl"}),
    Reader(
        name="config-toml",
        write=(write_settings_toml,),
        read=_reads_settings("c.toml"),
        roles={"c.toml": "toml"},
        names_file=False,
    ),
    Reader(
        name="config-json",
        write=(write_settings_json,),
        read=_reads_settings("c.json"),
        roles={"c.json": "json"},
        names_file=False,
    ),
    Reader(
        name="lrpq-json",
        write=(write_lrpq_json,),
        read=read_lrpq_json,
        roles={"lrpq.json": "json"},
        links=LINKS_OUT,
    ),
)
READERS_BY_NAME: Mapping[str, Reader] = {reader.name: reader for reader in READERS}
