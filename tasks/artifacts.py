"""Names of every object of a run. A stage's folder is its key, so what another configuration made is never read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFolder:
    """Folder of one stage of one run in the store."""

    run_id: str
    stage: str
    key: str
    """sha256 over the stage's inputs, parameters, environment and code."""

    @property
    def prefix(self) -> str:
        """Key prefix of all objects of the stage."""
        return f"{self.run_id}/{self.stage}/{self.key[:24]}"

    @property
    def manifest(self) -> str:
        """Written last: a stage with a manifest is complete."""
        return f"{self.prefix}/manifest.json"

    def object(self, name: str) -> str:
        """Key of one object."""
        return f"{self.prefix}/{name}"

    def block(self, kind: str, block: int, ending: str) -> str:
        """Key of one block's object, e.g. ``hessians-017.parquet``."""
        return self.object(f"{kind}-{block:03d}.{ending}")

    def site(self, kind: str, block: int, site: str, ending: str) -> str:
        """Key of one input site's object, e.g. ``candidates-017-qkv.safetensors``."""
        return self.object(f"{kind}-{block:03d}-{site}.{ending}")

    def module(self, name: str) -> str:
        """Key of one module's codes."""
        return self.object(f"{name}.safetensors")
