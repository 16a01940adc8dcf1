"""Waypoints: the state of a streaming stage in the store, every K blocks, so that a kill costs at most K blocks.

One object a shard, so that any number of workers can go on from there. They belong to the stage's folder and are
removed when the stage is complete.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial

from torch import Tensor

from lrpq.errors import StoreError, WaypointGone
from tasks.artifacts import StageFolder
from tasks.store.host_threads import in_order
from tasks.store.objects import ObjectStore
from tasks.store.tensors import read_metadata, read_tensors, write_tensors

FOLDER = "waypoints"
DELETED_AT_ONCE = 8
"""An estimate, not swept."""
_NAME = re.compile(r"([a-z]+)-(\d+)-(\d+)\.safetensors")


def is_waypoint(block: int, num_blocks: int) -> bool:
    """Whether the state in front of a block is stored: of every K-th, K about the square root of their number.

    K blocks are computed again after a kill, and num_blocks / K states are written: the square root makes both small.
    """
    return 0 < block < num_blocks and block % math.ceil(math.sqrt(num_blocks)) == 0


def write_waypoint(
    store: ObjectStore,
    folder: StageFolder,
    kind: str,
    block: int,
    shards: Mapping[int, Mapping[str, Tensor]],
    metadata: Mapping[int, Mapping[str, str]] | None = None,
) -> None:
    """Store some shards' state in front of a block, as many at once as there are threads that move bytes."""
    writes = (
        partial(write_tensors, store, _key(folder, kind, block, shard), tensors, (metadata or {}).get(shard, {}))
        for shard, tensors in shards.items()
    )
    with closing(in_order(writes)) as written:
        deque(written, maxlen=0)


def read_waypoint(
    store: ObjectStore, folder: StageFolder, kind: str, block: int, shards: Iterable[int]
) -> dict[int, dict[str, Tensor]]:
    """Shard -> its state in front of a block.

    Raises:
        WaypointGone: it was removed since ``blocks_with_waypoint`` saw it.
    """
    keys = {shard: _key(folder, kind, block, shard) for shard in shards}
    with _there(store, folder, keys.values()):
        return {shard: read_tensors(store, key) for shard, key in keys.items()}


def read_waypoint_metadata(
    store: ObjectStore, folder: StageFolder, kind: str, block: int, shards: Iterable[int]
) -> dict[int, dict[str, str]]:
    """Shard -> what was written beside its state.

    Raises:
        WaypointGone: as for ``read_waypoint``.
    """
    keys = {shard: _key(folder, kind, block, shard) for shard in shards}
    with _there(store, folder, keys.values()):
        return {shard: read_metadata(store, key) for shard, key in keys.items()}


@contextmanager
def _there(store: ObjectStore, folder: StageFolder, keys: Collection[str]) -> Iterator[None]:
    """What cannot be read although it is there is another error."""
    try:
        yield
    except StoreError as error:
        if not all(store.exists(key) for key in keys):
            raise WaypointGone(
                f"{folder.prefix}: its waypoints were removed while they were read; if no other driver is at this run, "
                "the same command goes on"
            ) from error
        raise


def blocks_with_waypoint(store: ObjectStore, folder: StageFolder, kind: str, num_shards: int) -> list[int]:
    """Blocks in front of which the state of every shard is stored, in order."""
    found: dict[int, set[int]] = {}
    for key in store.list(folder.object(FOLDER)):
        match = _NAME.fullmatch(key.rsplit("/", 1)[-1])
        if match is not None and match[1] == kind:
            found.setdefault(int(match[2]), set()).add(int(match[3]))
    return sorted(block for block, shards in found.items() if len(shards) == num_shards)


def remove_waypoints(store: ObjectStore, folder: StageFolder) -> None:
    """Remove them all: the stage is complete. Several at once: a request takes its time whatever it is for, and so does
    the system for the pages of gigabytes in memory."""
    keys = list(store.list(folder.object(FOLDER)))
    with ThreadPoolExecutor(DELETED_AT_ONCE, thread_name_prefix="lrpq-delete") as threads:
        deque(threads.map(store.delete, keys), maxlen=0)


def _key(folder: StageFolder, kind: str, block: int, shard: int) -> str:
    return folder.object(f"{FOLDER}/{kind}-{block:03d}-{shard:04d}.safetensors")
