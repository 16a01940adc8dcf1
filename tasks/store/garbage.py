"""What in a store nobody needs: temporaries of processes that died, and objects that no finished or live run names.

A run is live while anything in it is younger than the age limit: every start of a run leaves a mark in it (mark_start),
so one that goes on after months is live before it reads anything. Of a live run nothing but old temporaries is found.
Of the others are found: stages without a manifest (they were interrupted and never completed), what a finished stage
does not name, and old marks. What does not look like the store's own is left alone and counted.
"""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from lrpq.errors import StoreError
from tasks.store.local import LocalStore
from tasks.store.manifest import read_manifest
from tasks.store.objects import ObjectStore, is_key
from tasks.store.s3 import S3Store

DEFAULT_AGE_SECONDS = 7 * 24 * 3600.0
LEAST_AGE_SECONDS = 3600.0
"""Uploads of large objects take minutes, and clocks of machines differ: nothing younger is ever touched."""
RUN_FILE = "run.json"
MANIFEST = "manifest.json"
STARTS = "starts"
OBJECTS = "objects"
"""In the notes of a stage's manifest: names of what the stage stored, below its folder."""
_STAGE_DEPTH = 3  # run/stage/key
_KEY_CHARACTERS = 24  # of a stage's key, in the name of its folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One object, or file, or unfinished upload below a store, whatever its name."""

    name: str
    num_bytes: int
    age_seconds: float
    upload_id: str | None = None
    """Of an unfinished multipart upload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What may be removed, and why."""

    entry: Entry
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found in a store."""

    garbage: tuple[Garbage, ...]
    kept_objects: int
    kept_bytes: int
    live_runs: tuple[str, ...]
    foreign: int
    """Objects that no version of lrpq names so: left alone."""
    doubtful: tuple[str, ...]
    """Manifests that cannot be read: their stages are left alone."""

    @property
    def num_bytes(self) -> int:
        """Of all garbage."""
        return sum(item.entry.num_bytes for item in self.garbage)


def mark_start(store: ObjectStore, run_id: str) -> None:
    """Say that a run is at work now, so that nothing of it is taken for abandoned."""

    def write(file: BinaryIO) -> None:
        file.write(b"started\n")

    store.publish(f"{run_id}/{STARTS}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:8]}", write)


def find_garbage(store: ObjectStore, *, older_than: float = DEFAULT_AGE_SECONDS) -> Findings:
    """Look through a store; changes nothing.

    Args:
        store: a folder or a bucket.
        older_than: seconds; what is younger is kept, whatever it is.

    Raises:
        StoreError: it cannot be listed, or the limit is shorter than the store is safe with.
    """
    if not older_than >= LEAST_AGE_SECONDS:
        raise StoreError(
            f"an age limit of {older_than:g} seconds is not safe beside running jobs: give at least "
            f"{LEAST_AGE_SECONDS:g}"
        )
    garbage: list[Garbage] = []
    by_run: dict[str, list[Entry]] = defaultdict(list)
    foreign = kept_objects = kept_bytes = 0
    for entry in entries(store):
        if "~" in entry.name or entry.upload_id is not None:
            if entry.age_seconds > older_than:
                garbage.append(Garbage(entry=entry, reason=_temporary(entry)))
        elif not is_key(entry.name) or "/" not in entry.name:
            foreign += 1
        else:
            by_run[entry.name.split("/", 1)[0]].append(entry)
    live, doubtful = [], []
    for run, found in sorted(by_run.items()):
        names = {entry.name for entry in found}
        if f"{run}/{RUN_FILE}" not in names:
            old = [e for e in found if run == "evaluations" and e.age_seconds > older_than]
            garbage += [Garbage(entry=entry, reason="windows of an evaluation outside of a run") for entry in old]
            foreign += len(found) if run != "evaluations" else 0
            continue
        if min(entry.age_seconds for entry in found) <= older_than:
            live.append(run)
            continue
        unneeded, unreadable = _of_run(store, run, found, older_than)
        garbage += unneeded
        doubtful += unreadable
    unneeded_names = {item.entry.name for item in garbage}
    for found in by_run.values():
        kept = [entry for entry in found if entry.name not in unneeded_names]
        kept_objects += len(kept)
        kept_bytes += sum(entry.num_bytes for entry in kept)
    return Findings(
        garbage=tuple(sorted(garbage, key=lambda item: item.entry.name)),
        kept_objects=kept_objects,
        kept_bytes=kept_bytes,
        live_runs=tuple(live),
        foreign=foreign,
        doubtful=tuple(doubtful),
    )


def remove_garbage(store: ObjectStore, findings: Findings, *, older_than: float = DEFAULT_AGE_SECONDS) -> Findings:
    """Remove what was found and is still garbage now; returns what was removed.

    The store is looked through once more just before: a run that has gone on meanwhile is live again. Of a stage the
    objects that say that something is done go first, so that whoever comes in between computes it again.

    Raises:
        StoreError: a failed request; what was removed before stays removed.
    """
    wanted = {(item.entry.name, item.entry.upload_id) for item in findings.garbage}
    now = find_garbage(store, older_than=older_than)
    still = [item for item in now.garbage if (item.entry.name, item.entry.upload_id) in wanted]
    for item in sorted(still, key=lambda item: (not item.entry.name.endswith(".parquet"), item.entry.name)):
        _remove(store, item.entry)
    return Findings(
        garbage=tuple(still),
        kept_objects=now.kept_objects,
        kept_bytes=now.kept_bytes,
        live_runs=now.live_runs,
        foreign=now.foreign,
        doubtful=now.doubtful,
    )


def entries(store: ObjectStore) -> Iterator[Entry]:
    """Everything below the store, also what is no object of it.

    Raises:
        StoreError: it cannot be listed.
    """
    if isinstance(store, LocalStore):
        yield from _local(store)
    elif isinstance(store, S3Store):
        yield from _remote(store)
    else:
        raise StoreError(f"{store.url}: this kind of store cannot be looked through")


def _of_run(store: ObjectStore, run: str, found: Sequence[Entry], older_than: float) -> tuple[list[Garbage], list[str]]:
    """Garbage of a run that is not live, and its manifests that cannot be read."""
    stages: dict[str, dict[str, Entry]] = defaultdict(dict)
    garbage: list[Garbage] = []
    for entry in found:
        parts = entry.name.split("/")
        if len(parts) > _STAGE_DEPTH:
            stages["/".join(parts[:_STAGE_DEPTH])]["/".join(parts[_STAGE_DEPTH:])] = entry
        elif parts[1] == STARTS:
            garbage.append(Garbage(entry=entry, reason="mark of a start"))
    named, doubtful = _named(store, stages)
    referenced = {value[:_KEY_CHARACTERS] for manifest in named.values() for value in manifest.inputs}
    for folder, objects in stages.items():
        if folder in named:
            unneeded = {name for name in objects if not named[folder].names(name)}
            garbage += [_unnamed(objects[name]) for name in unneeded if objects[name].age_seconds > older_than]
        elif f"{folder}/{MANIFEST}" not in doubtful and folder.rsplit("/", 1)[1] not in referenced:
            garbage += [Garbage(entry=e, reason="of a stage that was never completed") for e in objects.values()]
    return garbage, doubtful


def _unnamed(entry: Entry) -> Garbage:
    return Garbage(entry=entry, reason="not named by its stage's manifest")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """What a finished stage's manifest names."""

    objects: frozenset[str] | None
    """Below its folder; None if it does not list them: then all are taken to be."""
    inputs: tuple[str, ...]

    def names(self, name: str) -> bool:
        return name == MANIFEST or self.objects is None or name in self.objects


def _named(store: ObjectStore, stages: Mapping[str, Mapping[str, Entry]]) -> tuple[dict[str, _Named], list[str]]:
    found: dict[str, _Named] = {}
    doubtful = []
    for folder, objects in stages.items():
        if MANIFEST not in objects:
            continue
        key = f"{folder}/{MANIFEST}"
        try:
            manifest = read_manifest(store, key)
        except StoreError:
            doubtful.append(key)
            continue
        listed = manifest.extra.get(OBJECTS)
        names = set(map(str, listed)) if isinstance(listed, list) else set()
        names |= {name.removeprefix(f"{folder}/") for name in manifest.objects}
        inputs = tuple(text for value in manifest.inputs.values() for text in value.split())
        found[folder] = _Named(objects=frozenset(names) if names else None, inputs=inputs)
    return found, doubtful


def _temporary(entry: Entry) -> str:
    if entry.upload_id is not None:
        return "upload that was never completed"
    if entry.name.startswith("~claims/"):
        return "claim of a process that is gone"
    return "probe of a store" if entry.name.startswith("~probe-") else "temporary file of a process that is gone"


def _local(store: LocalStore) -> Iterator[Entry]:
    now = time.time()
    try:
        for path in sorted(store.root.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            try:
                status = path.stat()
            except FileNotFoundError:  # another process was faster
                continue
            name = path.relative_to(store.root).as_posix()
            yield Entry(name=name, num_bytes=status.st_size, age_seconds=now - status.st_mtime)
    except OSError as error:
        raise StoreError(f"cannot list {store.url}: {error.strerror}") from error


def _remote(store: S3Store) -> Iterator[Entry]:
    client = store.client
    for item in client.listed():
        yield Entry(name=item.name, num_bytes=item.num_bytes, age_seconds=item.age_seconds)
    for upload in client.unfinished_uploads():
        yield Entry(name=upload.name, num_bytes=0, age_seconds=upload.age_seconds, upload_id=upload.upload_id)


def _remove(store: ObjectStore, entry: Entry) -> None:
    if isinstance(store, LocalStore):
        path = store.root / entry.name
        try:
            path.unlink(missing_ok=True)
            for folder in path.parents:
                if folder == store.root or folder.name == "~temporary":
                    break
                folder.rmdir()
        except OSError as error:
            if path.exists():
                raise StoreError(f"cannot remove {entry.name} in {store.url}: {error.strerror}") from error
    elif isinstance(store, S3Store):
        if entry.upload_id is not None:
            store.client.call_quietly("abort_multipart_upload", entry.name, UploadId=entry.upload_id)
        else:
            store.client.call("delete_object", entry.name)
