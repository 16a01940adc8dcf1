"""One run in its store: stage keys, manifests, what was reused, how long everything took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows import ctrl_c
from flows.progress import Progress
from tasks.artifacts import StageFolder
from tasks.store.keys import artifact_key, code_digest, environment_fingerprint
from tasks.store.manifest import StageManifest, read_manifest, utc_now, write_manifest
from tasks.store.objects import ObjectStore


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
    _stages: dict[str, _Identity] = field(default_factory=dict)

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
        self.reused.append(label)
        self.seconds[label] = 0.0
        self.progress.done(label, seconds=0.0, reused=True)
        return manifest.extra

    @contextmanager
    def timed(self, label: str, total: int, unit: str = "block") -> Iterator[None]:
        """Report and time a stage."""
        started = time.monotonic()
        self.progress.stage(label, total, unit)
        yield
        self.seconds[label] = time.monotonic() - started
        self.progress.done(label, seconds=self.seconds[label], reused=False)

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
            extra=dict(extra),
        )
        write_manifest(self.store, folder.manifest, manifest)
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


def step(name: str, action: Callable[[], Any]) -> Any:
    """Run an action as a Prefect task run that a person can read, e.g. ``candidates · block 17``.

    No retries and no result caching here: Ray retries what computes, and the store knows what is done.
    """
    ctrl_c.raise_if_asked()
    stage = name.split(" · ", 1)[0]
    return task(name=stage, task_run_name=name, cache_policy=NO_CACHE, persist_result=False, retries=0)(action)()
