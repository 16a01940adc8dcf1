"""``--rotate``: from the configuration to a rotated model, and what a manifest says of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from flows.run_config import RunConfig
from flows.sections import MAX_SEED
from lrpq.errors import CheckpointError
from lrpq.model.safetensors_source import ModelSource
from lrpq.transform.folded import FoldedSource
from lrpq.transform.orthogonal import RotationKind
from lrpq.transform.rotated import RotatedSource, Rotation
from lrpq.transform.rotation import RotationScope

NONE = "none"


def rotation_of(config: RunConfig) -> Rotation | None:
    """The rotation that is asked for."""
    if config.rotate == NONE:
        return None
    return Rotation(kind=RotationKind(config.rotate), scope=RotationScope.RESIDUAL_AND_VALUES, seed=config.seed)


def rotated(source: ModelSource, config: RunConfig) -> ModelSource:
    """The model as it is compressed.

    Raises:
        ModelError: it is to be rotated and computes another function then.
    """
    rotation = rotation_of(config)
    return source if rotation is None else RotatedSource(source, rotation)


def rotated_fingerprint(fingerprint: str, rotation: Rotation | None) -> str:
    """Identity of the weights that are compressed, from that of the model's files."""
    if rotation is None:
        return fingerprint
    parts = [fingerprint, rotation.kind.value, rotation.scope.value, rotation.seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def rotation_json(rotation: Rotation | None, source: ModelSource) -> dict[str, Any] | None:
    """What the manifest says; None where nothing is rotated."""
    if rotation is None or not isinstance(source, FoldedSource):
        return None
    return {
        "kind": rotation.kind.value,
        "scope": rotation.scope.value,
        "seed": rotation.seed,
        "untied_head": source.unties_head,
        "added_bytes": source.added_bytes,
    }


def stored_rotation(manifest: Mapping[str, Any] | None) -> Rotation | None:
    """The rotation of a checkpoint by its manifest; None where there is none.

    Raises:
        CheckpointError: the manifest names one that this version does not know.
    """
    found = None if manifest is None else manifest.get("rotation")
    if found is None:
        return None
    try:
        kind, scope, seed = RotationKind(found["kind"]), RotationScope(found["scope"]), found["seed"]
        if type(seed) is not int or not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed {seed!r}")
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"lrpq.json: its rotation is none that this version of lrpq knows ({error})") from error
    return Rotation(kind=kind, scope=scope, seed=seed)
