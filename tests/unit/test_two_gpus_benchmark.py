"""``benchmarks.two_gpus``: what it says of two runs' objects and times; the stages have tests of their own."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import torch

from benchmarks.two_gpus.ledger import Ledger
from benchmarks.two_gpus.objects import compare, digest
from benchmarks.two_gpus.stages import Done, Stage
from benchmarks.two_gpus.table import stage_table
from tasks.artifacts import StageFolder
from tasks.store.objects import ObjectStore, open_store
from tasks.store.tensors import write_symmetric, write_tensors
from tasks.upper_triangle import Band

FOLDER = StageFolder(run_id="two", stage="profile", key="0" * 64)


def put(store: ObjectStore, key: str, content: bytes) -> None:
    def write(file: BinaryIO) -> None:
        file.write(content)

    assert store.publish(key, write)


def stored(folder: Path, *, codes: torch.Tensor, hessian: torch.Tensor, manifest: bytes) -> Done:
    store = open_store(str(folder))
    write_tensors(store, FOLDER.module("q_proj"), {"codes": codes})
    write_symmetric(store, FOLDER.block("hessians", 0, "parquet"), {"qkv": hessian})
    put(store, FOLDER.manifest, manifest)
    return Done(store=store, stages={}, folders={"profile": FOLDER}, losses=[])


def test_same_bytes_are_identical_whatever_the_manifests_say(tmp_path: Path) -> None:
    values = {"codes": torch.arange(64, dtype=torch.int8), "hessian": torch.eye(8)}
    one = stored(tmp_path / "one", **values, manifest=b"1.0 s")
    two = stored(tmp_path / "two", **values, manifest=b"0.6 s")
    found = compare(one, two, "profile")
    assert found.objects == 2
    assert found.different == {}
    assert digest(one, "profile") == digest(two, "profile")


def test_a_difference_is_named_and_measured(tmp_path: Path) -> None:
    codes, hessian = torch.arange(64, dtype=torch.int8), 4 * torch.eye(8)
    one = stored(tmp_path / "one", codes=codes, hessian=hessian, manifest=b"a")
    changed = codes.clone()
    changed[5] += 1
    other = hessian.clone()
    other[2, 2] += 1.0
    two = stored(tmp_path / "two", codes=changed, hessian=other, manifest=b"a")
    put(two.store, FOLDER.object("only-here.json"), b"{}")
    found = compare(one, two, "profile").different
    assert found.pop(FOLDER.object("only-here.json")) == "only one run has it"
    assert found[FOLDER.module("q_proj")] == "1.56% of values, by up to 1.6e-02 of the tensor's largest"
    assert found[FOLDER.block("hessians", 0, "parquet")] == "1.56% of values, by up to 2.5e-01 of the tensor's largest"
    assert len(found) == 2


def test_a_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    values = {"codes": torch.arange(64, dtype=torch.int8), "hessian": torch.eye(8)}
    runs = [stored(tmp_path / name, **values, manifest=b"a") for name in ("one", "two")]
    put(runs[1].store, FOLDER.object("more.json"), b"{}")
    runs.append(stored(tmp_path / "three", **{**values, "hessian": 2 * torch.eye(8)}, manifest=b"a"))
    assert len({digest(run, "profile") for run in runs}) == 3


def test_parts_of_matrices_are_not_said_to_be_equal(tmp_path: Path) -> None:
    stores = []
    for value in (1.0, 9.0):
        store = open_store(str(tmp_path / str(value)))
        matrices = {"down": value * torch.eye(1200), "qkv": torch.eye(8)}
        write_symmetric(store, FOLDER.block("hessians", 0, "parquet"), matrices, bands={"down": Band(0, 1, 2)})
        stores.append(Done(store=store, stages={}, folders={"profile": FOLDER}, losses=[]))
    (said,) = compare(*stores, "profile").different.values()
    assert said == "other bytes, and parts of matrices among them, which are not compared"


def test_waiting_is_what_workers_did_not_spend_in_calls() -> None:
    workers = [
        Ledger(calls={"backward": [3, 4.0, 0.0]}, moved={"kept inputs": 0.5}, peak_bytes=3_000_000_000, busy=4.0),
        Ledger(calls={"backward": [3, 3.0, 0.0], "end": [1, 0.5, 0.0]}, peak_bytes=2_000_000_000, busy=3.5),
    ]
    alone = Stage(seconds=9.0, ended=0.0, workers=[Ledger(calls={"backward": [6, 8.0, 0.0]}, busy=8.0)])
    both = Stage(seconds=5.0, ended=0.0, workers=workers)
    runs = [Done(store=None, stages={"profile": s}, folders={}, losses=[]) for s in (alone, both)]  # type: ignore[arg-type]
    row = list(stage_table(runs))[2]
    assert row == "| profile | 9.00 | 5.00 | 1.80 | 0.00 / 1.00 | 0.50 / 2.50 | 0.00 | 3.00, 2.00 |"
