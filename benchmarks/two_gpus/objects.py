"""Whether two runs stored the same bytes, and if not, how far apart they are."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.two_gpus.stages import Done
from tasks.store.objects import ObjectStore, record_of
from tasks.store.symmetric import symmetric_index
from tasks.store.tensors import read_symmetric, read_tensors
from tasks.upper_triangle import WHOLE

SHOWN = 5
"""Objects that differ whose distance is computed."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One stage of two runs."""

    objects: int
    num_bytes: int
    different: dict[str, str]
    """Object -> how it differs."""


def compare(one: Done, other: Done, stage: str) -> Compared:
    """All objects of a stage but its manifest, which says how long it took."""
    first, second = (_checksums(done.store, done.folders[stage].prefix) for done in (one, other))
    different = dict.fromkeys(sorted(first.keys() ^ second.keys()), "only one run has it")
    for key in sorted(first.keys() & second.keys()):
        if first[key] != second[key]:
            shown = len(different) < SHOWN
            different[key] = _distance(one.store, other.store, key) if shown else "other bytes"
    return Compared(objects=len(first), num_bytes=sum(size for _, size in first.values()), different=different)


def digest(done: Done, stage: str) -> str:
    """Of what ``compare`` looks at, names and contents: runs of two processes are compared by it."""
    prefix = done.folders[stage].prefix
    found = _checksums(done.store, prefix)
    lines = (f"{key.removeprefix(prefix)} {found[key][0]}" for key in sorted(found))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _checksums(store: ObjectStore, prefix: str) -> dict[str, tuple[str, int]]:
    keys = [key for key in store.list(prefix) if not key.endswith("/manifest.json")]
    with ThreadPoolExecutor(8) as threads:
        records = threads.map(lambda key: record_of(store, key), keys)
        return {key: (record.sha256, record.num_bytes) for key, record in zip(keys, records, strict=True)}


def _distance(one: ObjectStore, other: ObjectStore, key: str) -> str:
    """The largest difference of any of the object's tensors, and the share of values that are not the same."""
    if key.endswith(".safetensors"):
        pairs = [
            (a, b) for a, b in zip(read_tensors(one, key).values(), read_tensors(other, key).values(), strict=True)
        ]
    elif "/hessians-" in key or "/outputs-" in key:
        whole = [name for name, band in symmetric_index(one, key).bands.items() if band == WHOLE]
        pairs = [(read_symmetric(one, key, name)[0], read_symmetric(other, key, name)[0]) for name in whole]
        if len(whole) < len(symmetric_index(one, key).bands):
            return "other bytes, and parts of matrices among them, which are not compared"
    else:
        return "other bytes in a table"
    worst = max(_relative(a, b) for a, b in pairs)
    changed = sum(int((a != b).sum()) for a, b in pairs) / max(sum(a.numel() for a, _ in pairs), 1)
    return f"{changed:.2%} of values, by up to {worst:.1e} of the tensor's largest"


def _relative(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    wide = torch.float64 if a.is_floating_point() else torch.int64
    a, b = a.to(wide), b.to(wide)
    return float((a - b).abs().max()) / max(float(a.abs().max()), 1e-300)
