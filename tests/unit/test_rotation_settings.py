"""``rotate`` in a configuration and in a manifest."""

from __future__ import annotations

from typing import Any

import pytest

from flows.rotation import rotated_fingerprint, rotation_of, stored_rotation
from flows.run_config import RunConfig, default_run_id
from lrpq.errors import CheckpointError
from lrpq.transform.orthogonal import RotationKind
from lrpq.transform.rotated import Rotation
from lrpq.transform.rotation import RotationScope

HADAMARD = Rotation(kind=RotationKind.HADAMARD, scope=RotationScope.RESIDUAL_AND_VALUES, seed=7)
STORED: dict[str, Any] = {"kind": "hadamard", "scope": "residual_and_values", "seed": 7}


def test_the_run_decides() -> None:
    assert rotation_of(RunConfig(model="m", seed=7)) is None
    assert rotation_of(RunConfig(model="m", seed=7, rotate="hadamard")) == HADAMARD
    assert default_run_id(RunConfig(model="m", rotate="hadamard")) != default_run_id(RunConfig(model="m"))


def test_weights_of_another_rotation_are_others() -> None:
    """The control depends on no seed but through the weights that it quantizes."""
    scope = RotationScope.RESIDUAL
    others = [
        None,
        HADAMARD,
        Rotation(kind=HADAMARD.kind, scope=HADAMARD.scope, seed=8),
        Rotation(kind=RotationKind.RANDOM, scope=HADAMARD.scope, seed=7),
        Rotation(kind=HADAMARD.kind, scope=scope, seed=7),
    ]
    assert len({rotated_fingerprint("f", rotation) for rotation in others}) == len(others)
    assert rotated_fingerprint("f", None) == "f"
    assert rotated_fingerprint("g", HADAMARD) != rotated_fingerprint("f", HADAMARD)


def test_a_manifest_names_its_rotation() -> None:
    assert stored_rotation({"rotation": STORED}) == HADAMARD
    for without in (None, {}, {"rotation": None}):
        assert stored_rotation(without) is None


@pytest.mark.parametrize(
    "found",
    [
        {},
        "hadamard",
        STORED | {"kind": "spin"},
        STORED | {"seed": -1},
        STORED | {"seed": 2**70},
        STORED | {"seed": True},
        [STORED],
    ],
)
def test_an_unknown_rotation_is_refused(found: Any) -> None:
    with pytest.raises(CheckpointError, match="its rotation is none that this version of lrpq knows"):
        stored_rotation({"rotation": found})
