"""How the model is changed before it is compressed: from the configuration, to the manifest and back from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from flows.rotation import rotated, rotated_fingerprint, rotation_json, rotation_of, stored_rotation
from flows.run_config import RunConfig
from lrpq.errors import CheckpointError
from lrpq.model.safetensors_source import ModelSource
from lrpq.transform.changed import Change
from lrpq.transform.exponents import Exponents
from lrpq.transform.folded import FoldedSource
from lrpq.transform.magnitudes import choose_exponents

MAX_EXPONENT = 126
"""2^126 and 2^-126 are normal numbers of bfloat16."""


def change_of(config: RunConfig, source: ModelSource, *, scaled: bool) -> Change:
    """What is asked for.

    Args:
        config: of the run.
        source: the original, of which a few rows are read if it is scaled.
        scaled: whether weights are brought to the magnitude at which their scales fit 8 bits.

    Raises:
        ModelError: the architecture computes another function then.
    """
    rotation = rotation_of(config)
    if not scaled:
        return Change(rotation=rotation)
    below = rotated(source, config)
    plan = below.plan if isinstance(below, FoldedSource) else None
    return Change(rotation=rotation, exponents=choose_exponents(source, plan))


def changed_fingerprint(fingerprint: str, change: Change) -> str:
    """Identity of the weights that are compressed, from that of the model's files."""
    found = rotated_fingerprint(fingerprint, change.rotation)
    if change.exponents is None:
        return found
    return hashlib.sha256(json.dumps([found, asdict(change.exponents)], sort_keys=True).encode()).hexdigest()


def change_json(change: Change, source: ModelSource) -> dict[str, Any]:
    """What the manifest says.

    Args:
        change: how the original was changed.
        source: the changed model.
    """
    return {
        "rotation": rotation_json(change.rotation, source),
        "exponents": None if change.exponents is None else _exponents_json(change.exponents),
    }


def _exponents_json(exponents: Exponents) -> dict[str, Any]:
    return {**asdict(exponents), "blocks": [dict(of_block) for of_block in exponents.blocks]}


def stored_change(manifest: Mapping[str, Any] | None) -> Change:
    """How the model of a checkpoint was changed, by its manifest.

    Raises:
        CheckpointError: the manifest names a change that this version does not know.
    """
    return Change(rotation=stored_rotation(manifest), exponents=_stored_exponents(manifest))


def _stored_exponents(manifest: Mapping[str, Any] | None) -> Exponents | None:
    found = None if manifest is None else manifest.get("exponents")
    if found is None:
        return None
    try:
        blocks = tuple(dict(of_block) for of_block in found["blocks"])
        residual, head = found["residual"], found["head"]
        for k in (residual, head, *(k for of_block in blocks for k in of_block.values())):
            if type(k) is not int or abs(k) > MAX_EXPONENT:
                raise ValueError(f"exponent {k!r}")
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"lrpq.json: its exponents are none that this version of lrpq knows ({error})") from error
    return Exponents(blocks=blocks, residual=residual, head=head)
