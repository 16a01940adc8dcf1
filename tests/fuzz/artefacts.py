"""A valid artefact of everything that is read, as small as it can be; each function fills an empty folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from flows.manifest_file import write_manifest_file
from lrpq.activations.grids import LogarithmicGrid, UniformGrid
from lrpq.checkpoint.assemble import write_checkpoint
from lrpq.checkpoint.formats import CheckpointFormat
from lrpq.classifier import write_classifier as write_quantized
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream
from lrpq.quant.rtn import round_to_nearest
from tasks.store.local import LocalStore
from tasks.store.manifest import StageManifest, claim_run, write_manifest
from tasks.store.objects import record_of
from tasks.store.tables import write_table
from tasks.store.tensors import write_symmetric, write_tensors

# ---- models --------------------------------------------------------------------------------------


LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 32,
    "max_position_embeddings": 64, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "bos_token_id": 1, "eos_token_id": [2, 3], "dtype": "float32", "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
}  # fmt: skip


CONFIGURED = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text", "phi3", "opt", "gpt_neox"),
    *("mixtral", "qwen3_moe", "gpt_bigcode", "gpt2", "deepseek_v3", "llava", "bert", "t5"),
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


def writes_config_of(model_type: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        _write_tensors(folder / "model.safetensors")
        _write_config(folder, AutoConfig.for_model(model_type).to_dict())

    return write


CHOICES = {
    "model.layers.0.self_attn.q_proj": Choice(bits=3, group_size=16),
    "model.layers.0.self_attn.o_proj": Choice(bits=4, group_size=-1),
    "model.layers.0.mlp.down_proj": Choice(bits=8, group_size=32),
}


LINEARS = tuple(
    LinearSpec(name=name, block=0, d_out=32, d_in=32, input_site="x", fused_group=name)
    for name in (*CHOICES, "model.layers.0.mlp.up_proj")
)


def writes_checkpoint(
    *, max_shard_bytes: int = 10**9, format: CheckpointFormat = CheckpointFormat.COMPRESSED_TENSORS
) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        torch.manual_seed(0)
        model = folder.with_name("original")
        LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(model)
        source = ModelSource(model)
        streams = format is CheckpointFormat.TRELLIS
        choices = {name: replace(choice, trellis=streams and choice.bits != 8) for name, choice in CHOICES.items()}
        write_checkpoint(
            source,
            folder,
            quantized=lambda name: replace(
                round_to_nearest(source.read(f"{name}.weight"), CHOICES[name]), choice=choices[name]
            ),
            choices=choices,
            manifest={},
            format=format,
            max_shard_bytes=max_shard_bytes,
        )

    return write


def write_classifier(folder: Path) -> None:
    """A ViT of one block with grids in compressed-tensors' form and in the table."""
    torch.manual_seed(0)
    model = folder.with_name("original")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 4, "patch_size": 2, "num_labels": 2}
    config = ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_channels=1)
    ViTForImageClassification(config).save_pretrained(model)
    stream = BlockStream(ModelSource(model), dtype=torch.float32)
    codes = {s.name: round_to_nearest(stream.weight(s), Choice(bits=4, group_size=-1)) for s in stream.specs[:-1]}
    step, shift = torch.tensor(0.25), torch.tensor(-0.17)
    whole = UniformGrid(bits=4, scale=step, offset=-6 * step)
    pattern = LogarithmicGrid(bits=3, scale=0.75, steps_per_octave=2)
    shifted = UniformGrid(bits=5, scale=step, offset=shift)
    write_quantized(
        stream.source,
        folder,
        quantized=codes.__getitem__,
        choices={name: weight.choice for name, weight in codes.items()},
        specs=stream.specs,
        grids=[{"qkv": whole, "o": shifted, "key": whole, "pattern": pattern, "down": shifted}],
        manifest={},
    )


# ---- the store -----------------------------------------------------------------------------------


def store_of(folder: Path) -> LocalStore:
    return LocalStore(root=folder.resolve(), url=str(folder))


def _writable(folder: Path) -> LocalStore:
    (folder / "~temporary").mkdir()
    return store_of(folder)


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


def write_hessians(folder: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    square = torch.randn(6, 6, generator=rng)
    matrices = {"qkv": square @ square.T, "o": torch.eye(2)}
    write_symmetric(_writable(folder), SYMMETRIC, matrices, {"qkv": {"tokens": 5, "weight": 0.25}})


def write_codes(folder: Path) -> None:
    content = {
        "codes": torch.arange(-6, 6, dtype=torch.int8).reshape(3, 4),
        "scales": torch.ones(3, 1, dtype=torch.bfloat16),
        "flag": torch.tensor(True),
        "none": torch.zeros(0, 3),
        "float8": torch.ones(4).to(torch.float8_e4m3fn),
    }
    write_tensors(_writable(folder), TENSORS, content, {"bits": "3", "module": "q_proj"})


def write_stage(folder: Path) -> None:
    store = _writable(folder)
    write_tensors(store, "r/o", {})
    manifest = StageManifest(
        stage="profile",
        key="k" * 64,
        inputs={"windows": "a" * 64},
        parameters={"bits": [2, 3], "damping": 0.01, "nested": {"x": None, "y": True}},
        environment={"torch": "2"},
        code="c" * 64,
        objects={"r/o": record_of(store, "r/o")},
        seconds=1.5,
        created="2026-11-22T06:30:00+00:00",
    )
    write_manifest(store, MANIFEST, manifest)


def write_run(folder: Path) -> None:
    claim_run(_writable(folder), "r", {"budget": 3.25, "model": "m", "files": ["a", None, True], "n": {"a": {"b": 1}}})


# ---- calibration ---------------------------------------------------------------------------------


TEXT_PARQUET, TEXT, ROWS = "t.parquet", "t.txt", "t.jsonl"


TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]


def _writes_parquet(columns: Mapping[str, Any], **options: Any) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(pa.table(dict(columns)), folder / TEXT_PARQUET, **options)


def _ids(kind: pa.DataType) -> pa.Array:
    return pa.array([[(row * 7 + i) % 100 for i in range(8)] for row in range(20)], kind)


def write_text(folder: Path) -> None:
    (folder / TEXT).write_text("première ligne\nzweite Zeile ☃\n\n最後 😀\n" * 3, encoding="utf-8")


def write_rows(folder: Path) -> None:
    rows = [{"id": 1, "text": "Hello"}, {"id": 2, "text": "é ☃"}, {"id": 3, "text": "", "more": [1, {"a": None}]}]
    (folder / ROWS).write_text("\n".join(map(json.dumps, rows)) + "\n")


def write_talk(folder: Path) -> None:
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": [{"type": "text", "text": "Yes"}]}]
    (folder / ROWS).write_text("\n".join(json.dumps({"messages": talk}) for talk in (TALK, shared, TALK)) + "\n")


def write_questions(folder: Path) -> None:
    rows = [
        {"id": 1, "ctx": "The sky is ", "choices": ["blue", "square"], "label": 0},
        {"ctx": "", "choices": ["é ☃", "a", "b c"], "label": 2, "more": {"a": [1.5, None]}},
    ]
    (folder / ROWS).write_text("\n".join(map(json.dumps, rows)) + "\n")


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


def write_lrpq_json(folder: Path) -> None:
    size = {"total_bytes": 10, "average_bits": 3.25}
    manifest = {"run_id": "r", "content_key": "a" * 64, "size": size, "configuration": {"plan": {"budget_bits": 3.25}}}
    write_manifest_file(folder / "lrpq.json", manifest)
