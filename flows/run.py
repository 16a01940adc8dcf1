"""One run in its store: stage keys, manifests, what was reused, how long everything took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flows import ctrl_c
from flows.progress import Progress
from lrpq.errors import ClusterError, WaypointGone, WorkerLost
from tasks.artifacts import StageFolder
from tasks.cluster import Pool
from tasks.store.keys import artifact_key, code_digest, environment_fingerprint
from tasks.store.manifest import StageManifest, read_manifest, utc_now, write_manifest
from tasks.store.objects import ObjectStore
from tasks.waypoints import FOLDER as WAYPOINTS
from tasks.waypoints import remove_waypoints

T = TypeVar("T")
MAX_FRUITLESS = 4
"""Losses in a row, without a unit of work between them, that are not chance any more."""
OBJECTS = "objects"
"""Where a stage's manifest names what the stage stored."""


Step = Callable[[str, Callable[[], Any]], Any]
"""Runs an action under a name."""


def shown_step(name: str, action: Callable[[], Any]) -> Any:
    """Run an action as a Prefect task run that a person can read, e.g. ``candidates · block 17``.

    No retries and no result caching here: Ray retries what computes, and the store knows what is done.

    It does not carry the flow run's tags. Before a task run with tags Prefect asks its server for limits of them,
    unless it did so in the last five seconds; the server, which is writing the events of that very task run, mostly
    answers 503 (SQLite's "database is locked"), and the client waits two seconds before it asks again.
    """
    from prefect import task  # stages run without Prefect too, where they are only measured
    from prefect.cache_policies import NO_CACHE
    from prefect.context import TagsContext

    ctrl_c.raise_if_asked()
    stage = name.split(" · ", 1)[0]
    shown = task(name=stage, task_run_name=name, cache_policy=NO_CACHE, persist_result=False, retries=0)(action)
    with TagsContext(current_tags=set()):
        return shown()


@dataclass(kw_only=True)
class Run:
    """State of one flow run. Everything durable is in the store; this only says where."""

    store: ObjectStore
    run_id: str
    progress: Progress
    device: str
    threads: int
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    step: Step = shown_step
    """How the parts of a stage are run."""
    _stages: dict[str, _Identity] = field(default_factory=dict)
    _advanced: int = 0
    """Units done since the run began."""

    @property
    def environment(self) -> dict[str, str]:
        """Versions and hardware that may change the bytes of a result."""
        return environment_fingerprint(self.device, threads=self.threads)

    def folder(
        self, stage: str, *, inputs: Mapping[str, str], parameters: Mapping[str, Any], code: Sequence[str]
    ) -> StageFolder:
        """Folder of a stage: its key covers inputs, parameters, environment and the syntax of its code."""
        environment = self.environment
        digest = code_digest(*code)
        key = artifact_key(stage, inputs=inputs, parameters=parameters, code=digest, environment=environment)
        self._stages[key] = _Identity(
            inputs=dict(inputs), parameters=dict(parameters), environment=environment, code=digest
        )
        return StageFolder(run_id=self.run_id, stage=stage, key=key)

    def stored(self, folder: StageFolder, label: str) -> Mapping[str, Any] | None:
        """What a complete stage left in its manifest, noting that it is reused; None if the stage is not complete."""
        if not self.store.exists(folder.manifest):
            return None
        manifest = read_manifest(self.store, folder.manifest)
        missing = missing_objects(self.store, folder, manifest)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            self.warn(f"{label}: {missing[0]}{more} is gone from {self.store.url}; the stage is completed again")
            self.store.delete(folder.manifest)
            return None
        if label not in self.seconds:  # candidates are made of two folded models: reused are those of both, or none
            self.reused.append(label)
            self.seconds[label] = 0.0
        self.progress.done(label, seconds=0.0, reused=True)
        return manifest.extra

    @contextmanager
    def timed(self, label: str, total: int, unit: str = "block") -> Iterator[None]:
        """Report and time a stage, or what is left of it after a loss."""
        started = time.monotonic()
        self.reused[:] = [reused for reused in self.reused if reused != label]
        self.progress.stage(label, total, unit)
        try:
            yield
        finally:
            self.seconds[label] = self.seconds.get(label, 0.0) + time.monotonic() - started
        self.progress.done(label, seconds=self.seconds[label], reused=False)

    def advance(self, label: str, detail: str = "") -> None:
        """Report one more unit of a stage."""
        self._advanced += 1
        self.progress.advance(label, detail)

    def survive(self, pool: Pool, label: str, attempt: Callable[[], T]) -> T:
        """Make an attempt at a stage; after the loss of a worker, or behind another driver, another
        one, which finds in the store what is done.

        Raises:
            ClusterError: workers are lost again and again and nothing gets done between.
        """
        fruitless = 0
        while True:
            before = self._advanced
            try:
                return attempt()
            except WaypointGone:  # another driver completes the stage: what it made is in the store
                fruitless += 1
                if fruitless == MAX_FRUITLESS:
                    raise
            except WorkerLost as loss:
                fruitless = fruitless + 1 if self._advanced == before else 1
                if fruitless == MAX_FRUITLESS:
                    raise ClusterError(
                        f"{label}: {MAX_FRUITLESS} workers were lost one after the other and nothing was done between "
                        f"(the last one: {loss}); there may be too little memory: use fewer workers"
                    ) from loss
                pool.renew()
                count = f"{len(pool)} worker" + ("s" if len(pool) > 1 else "")
                self.warn(f"{label}: a worker was lost ({loss}); it goes on with {count}")

    def finish(self, folder: StageFolder, label: str, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write the stage's manifest, last of all its objects; returns the stored one (a racing run may have won)."""
        identity = self._stages[folder.key]
        manifest = StageManifest(
            stage=folder.stage,
            key=folder.key,
            inputs=identity.inputs,
            parameters=identity.parameters,
            environment=identity.environment,
            code=identity.code,
            objects={},
            seconds=self.seconds.get(label, 0.0),
            created=utc_now(),
            extra=dict(extra) | {OBJECTS: stored_objects(self.store, folder)},
        )
        write_manifest(self.store, folder.manifest, manifest)
        remove_waypoints(self.store, folder)
        return read_manifest(self.store, folder.manifest).extra

    def warn(self, text: str) -> None:
        """Show a warning and keep it for the manifest."""
        self.warnings.append(text)
        self.progress.note(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Identity:
    """What a stage's key was made of."""

    inputs: dict[str, str]
    parameters: dict[str, Any]
    environment: dict[str, str]
    code: str


def stored_objects(store: ObjectStore, folder: StageFolder) -> list[str]:
    """Names of a stage's objects below its folder, but for its manifest and what it keeps only while it runs."""
    names = [key.removeprefix(f"{folder.prefix}/") for key in store.list(folder.prefix)]
    return [name for name in names if folder.object(name) != folder.manifest and not name.startswith(f"{WAYPOINTS}/")]


def missing_objects(store: ObjectStore, folder: StageFolder, manifest: StageManifest) -> list[str]:
    """What a complete stage stored and is not there any more."""
    named = manifest.extra.get(OBJECTS)
    asked = [str(name) for name in named] if isinstance(named, Sequence) and not isinstance(named, str) else []
    if not asked:
        return []
    present = set(stored_objects(store, folder))
    return [folder.object(name) for name in asked if name not in present]
