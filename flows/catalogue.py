"""What is in a store: runs, and what of them is done. Imports neither torch nor Ray nor Prefect."""

from __future__ import annotations

from typing import Any

from tasks.store.manifest import list_runs as stored_runs
from tasks.store.manifest import read_manifest, read_run
from tasks.store.opened import open_store

STAGES = (
    "calibrate",
    "heat-maps",
    "profile",
    "activations",
    "candidates",
    "responses",
    "allocate",
    "stitch",
    "forecast",
    "refine",
    "rebuild",
    "guard",
    "evaluate",
)


def list_runs(store: str) -> list[dict[str, Any]]:
    """Runs in the store with their model and finished stages."""
    opened = open_store(store)
    return [
        {"run_id": run_id, "model": str(read_run(opened, run_id).get("model")), "stages": _finished(store, run_id)}
        for run_id in stored_runs(opened)
    ]


def run_status(store: str, run_id: str) -> dict[str, Any]:
    """What a run is configured as, and what of it is done.

    Raises:
        StoreError: no such run.
    """
    opened = open_store(store)
    configuration = read_run(opened, run_id)
    stages = []
    for stage in STAGES:
        for key in opened.folders(f"{run_id}/{stage}"):
            manifest_key = f"{run_id}/{stage}/{key}/manifest.json"
            complete = opened.exists(manifest_key)
            manifest = read_manifest(opened, manifest_key) if complete else None
            stages.append(
                {
                    "stage": stage,
                    "key": key,
                    "complete": complete,
                    "objects": sum(1 for _ in opened.list(f"{run_id}/{stage}/{key}")),
                    "seconds": None if manifest is None else manifest.seconds,
                    "created": None if manifest is None else manifest.created,
                }
            )
    return {"run_id": run_id, "configuration": configuration, "stages": stages}


def _finished(store: str, run_id: str) -> list[str]:
    opened = open_store(store)
    return [
        stage
        for stage in STAGES
        if any(opened.exists(f"{run_id}/{stage}/{key}/manifest.json") for key in opened.folders(f"{run_id}/{stage}"))
    ]
