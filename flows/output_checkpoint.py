"""The checkpoint in the output folder: written by a worker, unless the very same one lies there already."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.manifest_file import MANIFEST, read_manifest_file
from flows.run import Run
from lrpq.errors import ConfigError, OutputBusy
from tasks import assemble
from tasks.cluster import Pool

BUSY_SECONDS = 1.0
"""Between two looks at an output folder that another process is writing."""

Call = tuple[Callable[..., Any], Any]
"""A function of a worker, and the job it is called with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputCheckpoint:
    """One checkpoint, whether it is there or not."""

    folder: Path
    key: str
    """Of its content."""
    count_bytes: Callable[[], int]
    """Bytes of what lies in the folder, as sizes of checkpoints are counted."""

    def manifest(self) -> dict[str, Any] | None:
        """The manifest in the folder, if it is this very checkpoint's: proved, its files of the right length."""
        found = read_manifest_file(self.folder / MANIFEST)
        if found is None or found.get("content_key") != self.key or not isinstance(found.get("verified"), dict):
            return None
        size = found.get("size")
        whole = isinstance(size, dict) and size.get("total_bytes") == self.count_bytes()
        return found if whole else None

    def write(self, run: Run, pool: Pool, call: Call, *, size: Mapping[str, Any]) -> Mapping[str, Any]:
        """Its size, and how it was proved; ``call`` writes it where it is not there.

        Args:
            run: what is told of it.
            pool: whose first worker writes it.
            call: returns the same.
            size: as planned.

        Raises:
            ConfigError: the folder holds something else.
        """
        there = self.manifest()
        if there is not None:
            run.reused.append(assemble.STAGE)
            run.seconds[assemble.STAGE] = 0.0
            run.progress.done(assemble.STAGE, seconds=0.0, reused=True)
            return {**size, "verified": there["verified"]}

        def attempt() -> Mapping[str, Any]:
            with run.timed(assemble.STAGE, 1, "checkpoint"):
                written: Mapping[str, Any] = run.step("assemble", lambda: self._written(pool, call, size))
                run.advance(assemble.STAGE)
            return written

        return run.survive(pool, assemble.STAGE, attempt)

    def _written(self, pool: Pool, call: Call, size: Mapping[str, Any]) -> Mapping[str, Any]:
        """Of two drivers of one run the second one waits for the first one's checkpoint."""
        while True:
            try:
                written: Mapping[str, Any] = pool.get([pool.submit(0, *call)])[0]
                return written
            except ConfigError as error:  # busy, or filled meanwhile
                there = self.manifest()
                if there is not None:
                    return {**size, "verified": there["verified"]}
                if not isinstance(error, OutputBusy):
                    raise
            time.sleep(BUSY_SECONDS)
