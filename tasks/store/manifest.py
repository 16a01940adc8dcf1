"""Manifests: what a stage made (written last) and which configuration a run id stands for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import BinaryIO

from lrpq.errors import RunMismatch, StoreError
from tasks.store.documents import JSON, document_bytes, parse_document, plain_json
from tasks.store.objects import ObjectRecord, ObjectStore, check_key
from tasks.store.schema import opened

_STAGE = "stage-manifest"
_RUN = "run"
_RUN_FILE = "run.json"
_SHOWN_CHARACTERS = 80
_SHA256_LENGTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StageManifest:
    """One finished stage: what it read, with what it ran, what it wrote."""

    stage: str
    """Name of the stage, e.g. ``hessians``."""
    key: str
    """Its artefact key (keys.artifact_key)."""
    inputs: Mapping[str, str]
    """Artefact keys of what it read, by role."""
    parameters: Mapping[str, JSON]
    """What it was asked."""
    environment: Mapping[str, str]
    """keys.environment_fingerprint."""
    code: str
    """keys.code_digest."""
    objects: Mapping[str, ObjectRecord]
    """Everything it wrote, by store key."""
    seconds: float
    """Wall time of the stage."""
    created: str
    """When it ended, UTC, ISO 8601 (utc_now)."""
    extra: Mapping[str, JSON] = field(default_factory=dict)
    """What else the report wants to know."""


def utc_now() -> str:
    """The time for ``StageManifest.created``, e.g. ``2026-11-22T06:30:00+00:00``."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_manifest(store: ObjectStore, key: str, manifest: StageManifest) -> bool:
    """Publish a manifest after everything it names; False if another worker's was first (then read that one).

    Raises:
        StoreError: an object it names is missing or of another length, NaN or a value JSON cannot hold, a
            failed write.
    """
    for name, record in manifest.objects.items():
        if (num_bytes := store.size(name)) != record.num_bytes:
            raise StoreError(f"manifest {key} names {name} with {record.num_bytes} bytes, {store.url} has {num_bytes}")
    body: dict[str, JSON] = {
        "stage": manifest.stage,
        "key": manifest.key,
        "inputs": dict(manifest.inputs),
        "parameters": manifest.parameters,
        "environment": dict(manifest.environment),
        "code": manifest.code,
        "objects": {
            name: {"bytes": record.num_bytes, "sha256": record.sha256} for name, record in manifest.objects.items()
        },
        "seconds": float(manifest.seconds),
        "created": manifest.created,
        "extra": manifest.extra,
    }
    try:
        _stage_manifest(plain_json(body, where=f"manifest {key}"))  # what no reader would take is not written
    except ValueError as error:
        raise StoreError(f"cannot write manifest {key}: {error}") from error
    return _publish(store, key, document_bytes(_STAGE, body, key=key))


def read_manifest(store: ObjectStore, key: str) -> StageManifest:
    """The manifest of a finished stage.

    Raises:
        StoreError: no such object, or it is truncated, changed or foreign.
    """
    with opened(store, key) as file:
        return _stage_manifest(parse_document(file.read(), _STAGE, key=key))


def claim_run(
    store: ObjectStore,
    run_id: str,
    configuration: Mapping[str, JSON],
    *,
    as_read: Callable[[dict[str, JSON]], dict[str, JSON]] = lambda stored: stored,
) -> None:
    """Make ``run_id`` stand for this configuration, or check that it does.

    Numbers are compared by value (3 and 3.0 are the same), everything else exactly.

    Args:
        store: where runs are.
        run_id: of the run.
        configuration: that it stands for.
        as_read: how a stored configuration is understood; an earlier version's lacks what came later.

    Raises:
        RunMismatch: the run has another configuration; the message names every field that differs.
        StoreError: a bad run id, a value JSON cannot hold, a damaged ``run.json``, a failed write.
    """
    key = _run_key(run_id)
    asked = plain_json(configuration, where="configuration")
    if _publish(store, key, document_bytes(_RUN, configuration, key=key)):
        return
    differences = _differences(as_read(read_run(store, run_id)), asked)
    if differences:
        raise RunMismatch(
            f"run {run_id} in {store.url} has another configuration: {'; '.join(differences)}; "
            "give the stored values or another run id"
        )


def read_run(store: ObjectStore, run_id: str) -> dict[str, JSON]:
    """The configuration of a run.

    Raises:
        StoreError: no such run, or its ``run.json`` is truncated, changed or foreign.
    """
    with opened(store, _run_key(run_id)) as file:
        return parse_document(file.read(), _RUN, key=_run_key(run_id))


def list_runs(store: ObjectStore) -> list[str]:
    """Ids of all runs, sorted."""
    return [name for name in store.folders() if store.exists(f"{name}/{_RUN_FILE}")]


def _run_key(run_id: str) -> str:
    if len(check_key(run_id)) != 1:
        raise StoreError(f"{run_id!r} is not a run id: expected one name of A-Z a-z 0-9 . _ = -, no slash")
    return f"{run_id}/{_RUN_FILE}"


def _publish(store: ObjectStore, key: str, content: bytes) -> bool:
    def write(file: BinaryIO) -> None:
        file.write(content)

    return store.publish(key, write)


def _stage_manifest(body: JSON) -> StageManifest:
    match body:
        case {
            "stage": str(stage),
            "key": str(key),
            "inputs": dict(inputs),
            "parameters": dict(parameters),
            "environment": dict(environment),
            "code": str(code),
            "objects": dict(objects),
            "seconds": float(seconds),
            "created": str(created),
            "extra": dict(extra),
        }:
            when = datetime.fromisoformat(created)
            if when.tzinfo is None or when.utcoffset():
                raise ValueError(f"its time {created!r} is not UTC")
            if not seconds >= 0.0:
                raise ValueError(f"its duration is {seconds!r} seconds")
            return StageManifest(
                stage=stage,
                key=key,
                inputs=_texts("inputs", inputs),
                parameters=parameters,
                environment=_texts("environment", environment),
                code=code,
                objects={name: _record(name, entry) for name, entry in objects.items()},
                seconds=seconds,
                created=created,
                extra=extra,
            )
    raise ValueError("it lacks a field of a stage manifest, or one has the wrong type")


def _texts(name: str, found: Mapping[str, JSON]) -> dict[str, str]:
    texts = {key: text for key, text in found.items() if isinstance(text, str)}
    if len(texts) != len(found):
        raise ValueError(f"its {name} are not all text")
    return texts


def _record(name: str, entry: JSON) -> ObjectRecord:
    match entry:
        case {"bytes": int(num_bytes), "sha256": str(sha256)}:
            if num_bytes >= 0 and len(sha256) == _SHA256_LENGTH and not set(sha256) - set("0123456789abcdef"):
                return ObjectRecord(num_bytes=num_bytes, sha256=sha256)
    raise ValueError(f"its entry of object {name!r} is malformed")


_NOTHING = object()


def _differences(stored: object, asked: object, path: str = "") -> list[str]:
    """``field: stored X, asked Y`` for every field that differs, nested fields with dots."""
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        found: list[str] = []
        for name in sorted(stored.keys() | asked.keys()):
            below = f"{path}.{name}" if path else name
            found += _differences(stored.get(name, _NOTHING), asked.get(name, _NOTHING), below)
        return found
    return [] if _same(stored, asked) else [f"{path}: stored {_shown(stored)}, asked {_shown(asked)}"]


def _same(a: object, b: object) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b  # True == 1 for Python, not for a configuration
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return not _differences(a, b)
    return a == b


def _shown(value: object) -> str:
    if value is _NOTHING:
        return "nothing"
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
