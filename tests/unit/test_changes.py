"""How a model is changed: from a configuration, as part of an identity, and in a manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_llama

from flows.changes import change_json, change_of, changed_fingerprint, stored_change
from flows.rotation import rotated_fingerprint, rotation_of
from flows.run_config import RunConfig
from lrpq.errors import CheckpointError
from lrpq.model.source import open_source
from lrpq.transform.changed import UNCHANGED, Change, changed, changed_as_stored
from lrpq.transform.exponents import Exponents
from lrpq.transform.magnitudes import choose_exponents
from lrpq.transform.rotated import RotatedSource

EXPONENTS = Exponents(blocks=({"qkv": 3, "gate_up": -1}, {}), residual=5, head=2)
STORED: dict[str, Any] = {"blocks": [{"qkv": 3, "gate_up": -1}, {}], "residual": 5, "head": 2}
ROTATION = rotation_of(RunConfig(model="m", seed=7, rotate="hadamard"))


def test_the_run_decides(tmp_path: Path) -> None:
    source = open_source(write_llama(tmp_path / "model", tied=True))
    plain, rotated = RunConfig(model="m", seed=7), RunConfig(model="m", seed=7, rotate="hadamard")
    assert change_of(plain, source, scaled=False) == UNCHANGED
    assert not change_of(plain, source, scaled=False)
    assert change_of(rotated, source, scaled=False) == Change(rotation=ROTATION)
    assert change_of(plain, source, scaled=True) == Change(exponents=choose_exponents(source))
    assert ROTATION is not None
    exponents = choose_exponents(source, RotatedSource(source, ROTATION).plan)
    assert change_of(rotated, source, scaled=True) == Change(rotation=ROTATION, exponents=exponents)
    assert exponents != choose_exponents(source)
    assert changed(source, UNCHANGED) is source
    assert changed_as_stored(source, UNCHANGED) is source


def test_weights_of_another_change_are_others() -> None:
    other = Exponents(blocks=({"qkv": 3, "gate_up": -2}, {}), residual=5, head=2)
    changes = [Change(rotation=r, exponents=e) for r in (None, ROTATION) for e in (None, EXPONENTS, other)]
    assert len({changed_fingerprint("f", change) for change in changes}) == len(changes)
    assert changed_fingerprint("f", UNCHANGED) == "f"
    assert changed_fingerprint("f", Change(rotation=ROTATION)) == rotated_fingerprint("f", ROTATION)
    turned = Exponents(blocks=({"gate_up": -1, "qkv": 3}, {}), residual=5, head=2)
    assert len({changed_fingerprint("f", Change(exponents=e)) for e in (EXPONENTS, turned)}) == 1


def test_a_manifest_names_its_change(tmp_path: Path) -> None:
    for without in (None, {}, {"rotation": None, "exponents": None}):
        assert stored_change(without) == UNCHANGED
    assert stored_change({"exponents": STORED}) == Change(exponents=EXPONENTS)
    source = open_source(write_llama(tmp_path / "model"))
    change = change_of(RunConfig(model="m", rotate="hadamard"), source, scaled=True)
    written = json.loads(json.dumps(change_json(change, changed(source, change))))
    assert stored_change(written) == change
    assert change_json(UNCHANGED, source) == {"rotation": None, "exponents": None}


@pytest.mark.parametrize(
    "found",
    [
        {},
        [STORED],
        "qkv",
        STORED | {"head": 1.0},
        STORED | {"residual": None},
        {key: STORED[key] for key in ("blocks", "head")},
        STORED | {"head": 127},
        STORED | {"head": True},
        STORED | {"blocks": [3]},
        STORED | {"blocks": [{"qkv": "3"}]},
        STORED | {"blocks": None},
    ],
)
def test_unknown_exponents_are_refused(found: Any) -> None:
    with pytest.raises(CheckpointError, match="its exponents are none that this version of lrpq knows"):
        stored_change({"exponents": found})
