"""Every reader of bytes from outside: its valid artefacts, which of their files are changed, what is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flows.config_file import load_config
from flows.manifest_file import read_manifest_file
from lrpq.checkpoint.activations import TABLE
from lrpq.checkpoint.formats import CheckpointFormat
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.checkpoint.stored_activations import table_from
from lrpq.classifier import load_classifier
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from tasks.calibration.documents import load_documents
from tasks.calibration.sources import ParquetSource, TextSource
from tasks.calibration.token_rows import read_token_windows, token_column
from tasks.questions import read_questions
from tasks.store.manifest import read_manifest, read_run
from tasks.store.symmetric import symmetric_index
from tasks.store.tables import read_table, units_of
from tasks.store.tensors import read_metadata, read_symmetric, read_tensors

from . import artefacts as a
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
    for spec in a.LINEARS:
        dense = checkpoint.weight(spec, torch.float32)
        if dense is not None:
            assert dense.shape == (spec.d_out, spec.d_in)
            assert bool(torch.isfinite(dense).all())
            found[f"{spec.name}.weight"] = digest(dense)
    return found


def read_classifier(folder: Path) -> Found:
    state = load_classifier(folder).state_dict()
    assert not any(tensor.is_meta for tensor in state.values())
    return {name: digest(tensor) for name, tensor in state.items()}


def read_grids(folder: Path) -> Found:
    """Without the digest that config.json has: what gets through must be grids."""
    found = {}
    for block, grids in enumerate(table_from((folder / TABLE).read_bytes(), folder / TABLE)):
        for place, grid in grids.items():
            values = grid.values(grid.codes(torch.tensor([0.0, 0.5, 1e9])))
            assert not bool(torch.isnan(values).any())
            found[f"{block} {place}"] = repr(grid)
    return found


def read_costs(folder: Path) -> Found:
    table = read_table(a.store_of(folder), a.TABLE, "costs")
    return {"units": repr(units_of(table)), "table": repr(table.to_pydict()), "schema": str(table.schema)}


def read_hessians(folder: Path) -> Found:
    store = a.store_of(folder)
    index = symmetric_index(store, a.SYMMETRIC)
    found = {"index": repr(index)}
    for name, width in index.widths.items():
        matrix, scalars = read_symmetric(store, a.SYMMETRIC, name)
        assert matrix.shape == (width, width)
        found[name] = f"{digest(matrix)} {scalars}"
    return found


def read_codes(folder: Path) -> Found:
    store = a.store_of(folder)
    tensors = {name: digest(tensor) for name, tensor in read_tensors(store, a.TENSORS).items()}
    return {"metadata": repr(sorted(read_metadata(store, a.TENSORS).items())), **tensors}


def read_stage(folder: Path) -> Found:
    return {"manifest": repr(read_manifest(a.store_of(folder), a.MANIFEST))}


def read_stored_run(folder: Path) -> Found:
    return {"run": repr(read_run(a.store_of(folder), "r"))}


def read_token_rows(folder: Path) -> Found:
    source = ParquetSource(location=str(folder / a.TEXT_PARQUET))
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
    return _documents(ParquetSource(location=str(folder / a.TEXT_PARQUET)))


def read_text(folder: Path) -> Found:
    return _documents(TextSource(location=str(folder / a.TEXT)))


def read_rows(folder: Path) -> Found:
    return _documents(TextSource(location=str(folder / a.ROWS)))


def read_multiple_choice(folder: Path) -> Found:
    found = read_questions(folder / a.ROWS).questions
    for question in found:  # what a tokenizer is given must be Unicode
        "".join((question.context, *question.choices)).encode()
        assert 0 <= question.label < len(question.choices) >= 2
    return {"questions": repr(found)}


def _reads_settings(file: str) -> Callable[[Path], Found]:
    return lambda folder: {"config": load_config(folder / file, {}).model_dump_json()}


def read_lrpq_json(folder: Path) -> Found:
    return {"manifest": repr(read_manifest_file(folder / "lrpq.json"))}


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"

READERS = (
    Reader(
        name="model",
        write=(a.write_single,),
        read=read_model,
        roles={"model.safetensors": "safetensors"},
        links=LINKS,
    ),
    Reader(
        name="model-index",
        write=(a.write_sharded,),
        read=read_model,
        roles={INDEX: "json", SHARDS[0]: "safetensors"},
        links=LINKS,
    ),
    Reader(
        name="model-config",
        write=tuple(a.writes_config_of(kind) for kind in a.CONFIGURED),
        read=read_config,
        roles={"config.json": "json"},
    ),
    Reader(
        name="model-gpt2",
        write=(a.write_gpt2,),
        read=read_model,
        roles={"config.json": "json", "model.safetensors": "safetensors"},
    ),
    Reader(
        name="checkpoint",
        write=(a.writes_checkpoint(), a.writes_checkpoint(format=CheckpointFormat.GPTQ)),
        read=read_checkpoint,
        roles={"config.json": "json", "model.safetensors": "safetensors"},
        links=LINKS,
    ),
    Reader(
        name="checkpoint-trellis",
        write=(a.writes_checkpoint(format=CheckpointFormat.TRELLIS),),
        read=read_checkpoint,
        roles={"config.json": "json", "model.safetensors": "safetensors"},
        links=LINKS,
    ),
    Reader(
        name="checkpoint-dense",
        write=(a.writes_checkpoint(format=CheckpointFormat.DENSE),),
        read=read_checkpoint,
        roles={"config.json": "json", "model.safetensors": "safetensors"},
        links=LINKS,
    ),
    Reader(
        name="checkpoint-index",
        write=(a.writes_checkpoint(max_shard_bytes=15_000),),
        read=read_checkpoint,
        roles={INDEX: "json", SHARDS[1]: "safetensors"},
        links=LINKS,
    ),
    Reader(
        name="classifier",
        write=(a.write_classifier,),
        read=read_classifier,
        roles={"config.json": "json", "model.safetensors": "safetensors", TABLE: "json"},
    ),
    Reader(name="activation-grids", write=(a.write_classifier,), read=read_grids, roles={TABLE: "json"}),
    Reader(
        name="store-table",
        write=(a.write_costs, a.write_windows),
        read=read_costs,
        roles={a.TABLE: "parquet"},
        links=LINKS_OUT,
        protected=True,
    ),
    Reader(
        name="store-symmetric",
        write=(a.write_hessians,),
        read=read_hessians,
        roles={a.SYMMETRIC: "parquet"},
        links=LINKS_OUT,
        protected=True,
    ),
    Reader(
        name="store-tensors",
        write=(a.write_codes,),
        read=read_codes,
        roles={a.TENSORS: "safetensors"},
        links=LINKS_OUT,
        protected=True,
    ),
    Reader(
        name="store-manifest",
        write=(a.write_stage,),
        read=read_stage,
        roles={a.MANIFEST: "json"},
        links=LINKS_OUT,
        protected=True,
    ),
    Reader(
        name="store-run",
        write=(a.write_run,),
        read=read_stored_run,
        roles={a.RUN: "json"},
        links=LINKS_OUT,
        protected=True,
    ),
    Reader(
        name="resealed-symmetric", write=(a.write_hessians,), read=read_hessians, roles={a.SYMMETRIC: "sealed-matrices"}
    ),
    Reader(name="resealed-tensors", write=(a.write_codes,), read=read_codes, roles={a.TENSORS: "sealed-tensors"}),
    Reader(name="resealed-manifest", write=(a.write_stage,), read=read_stage, roles={a.MANIFEST: "sealed-json"}),
    Reader(name="token-rows", write=a.TOKEN_PARQUET, read=read_token_rows, roles={a.TEXT_PARQUET: "parquet"}),
    Reader(
        name="parquet-documents",
        write=a.TEXT_PARQUET_WRITERS,
        read=read_parquet_documents,
        roles={a.TEXT_PARQUET: "parquet"},
    ),
    Reader(name="text", write=(a.write_text,), read=read_text, roles={a.TEXT: "text"}),
    Reader(name="jsonl", write=(a.write_rows, a.write_talk), read=read_rows, roles={a.ROWS: "jsonl"}),
    Reader(name="questions", write=(a.write_questions,), read=read_multiple_choice, roles={a.ROWS: "jsonl"}),
    Reader(
        name="config-toml",
        write=(a.write_settings_toml,),
        read=_reads_settings("c.toml"),
        roles={"c.toml": "toml"},
        names_file=False,
    ),
    Reader(
        name="config-json",
        write=(a.write_settings_json,),
        read=_reads_settings("c.json"),
        roles={"c.json": "json"},
        names_file=False,
    ),
    Reader(
        name="lrpq-json",
        write=(a.write_lrpq_json,),
        read=read_lrpq_json,
        roles={"lrpq.json": "json"},
        links=LINKS,
    ),
)
READERS_BY_NAME: Mapping[str, Reader] = {reader.name: reader for reader in READERS}
