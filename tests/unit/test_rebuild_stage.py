"""The stage that rebuilds blocks: it stores what the core makes of them, wherever it was interrupted."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tiny_images import images, write_classifier

from flows.reconstruction import helps
from lrpq.activations.calibrate import Means, calibrate
from lrpq.checkpoint.activations import grid_document, zero_point
from lrpq.errors import CalibrationError, StoreError
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import QuantizedWeight
from lrpq.quant.packing import pack
from lrpq.quant.rtn import round_to_nearest
from lrpq.tune.options import Reconstruction
from lrpq.tune.reconstruct import Rebuilder, divided
from tasks import rebuild
from tasks.artifacts import StageFolder
from tasks.chosen_grids import ChosenGrids, chosen_grids, fold, read_grids, rebuilt_key, rebuilt_with, write_block
from tasks.images.stored import write_images
from tasks.rebuild import RebuildJob
from tasks.store.opened import open_store
from tasks.store.tensors import write_tensors
from tasks.stored_codes import read_codes
from tasks.streams import StreamJob, open_source_of
from tasks.worker import Place, WorkerState

NUM_IMAGES, MICRO_BATCH = 16, 4
CHOICE = Choice(bits=3, group_size=-1)
OPTIONS = Reconstruction(steps=12, batch=8, checks=2, draws=1)
X = images(NUM_IMAGES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A folded classifier whose codes and grids are in a store, and the stage that rebuilds them."""

    job: RebuildJob
    codes: dict[str, QuantizedWeight]

    @property
    def stream(self) -> BlockStream:
        return BlockStream(open_source_of(self.job.stream), dtype=torch.float32)

    @property
    def grids(self) -> ChosenGrids:
        assert self.job.stream.activations is not None
        return self.job.stream.activations


def folder(stage: str) -> StageFolder:
    return StageFolder(run_id="run", stage=stage, key=stage[0] * 64)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    scratch = tmp_path_factory.mktemp("rebuild")
    model = write_classifier(scratch / "model", "vit")
    where = str(scratch / "store")
    store, source = open_store(where), open_source(model)
    write_images(store, "run/images.safetensors", X, torch.full((NUM_IMAGES,), -1))
    original = BlockStream(source, dtype=torch.float32)
    calibration = calibrate(original, X, widths=[4], means=Means.ALL & ~Means.JUDGED_BY_OUTPUT)
    for block in range(original.num_blocks):
        places = {key: place for key, place in calibration.places.items() if key[0] == block}
        write_block(store, folder("activations"), block, places)
    chosen = chosen_grids(where, folder("activations"), calibration.uniform(4), original.num_blocks)
    folded = BlockStream(fold(source, chosen), dtype=torch.float32)
    codes = {spec.name: round_to_nearest(folded.weight(spec), CHOICE, name=spec.name) for spec in folded.specs}
    for name, weight in codes.items():
        write_tensors(store, folder("refine").module(name), pack(weight))
    length = int(folded.embed(X[:1]).shape[1])
    stream = StreamJob(
        model=str(model),
        dtype="float32",
        store=where,
        windows="run/images.safetensors",
        length=length,
        num_tokens=NUM_IMAGES * length,
        num_shards=4,
        micro_batch=MICRO_BATCH,
        images=True,
        activations=chosen,
    )
    job = RebuildJob(
        stream=stream,
        folder=folder("rebuild"),
        codes=folder("refine"),
        choices=dict.fromkeys(codes, CHOICE),
        options=OPTIONS,
        seed=3,
    )
    return Case(job=job, codes=codes)


def worker() -> WorkerState:
    place = Place(index=0, num_workers=1, epoch=0)
    return WorkerState(device="cpu", threads=1, kept_bytes=1 << 20, place=place)


@pytest.fixture(scope="module")
def rebuilt(case: Case) -> Case:
    """The stage has run."""
    state = worker()
    state.run(rebuild.begin, case.job, 0)
    for block in range(case.stream.num_blocks):
        state.run(rebuild.rebuild, case.job, block)
    state.run(rebuild.end)
    assert not state.held
    beats = [name for name, _ in state.pulse().steps]
    assert beats.count("rebuild") > case.stream.num_blocks * OPTIONS.steps  # a long step must not look like a hang
    assert beats.count("begin") > 2 * case.stream.num_blocks * NUM_IMAGES // MICRO_BATCH
    return case


def test_it_stores_what_the_core_makes(rebuilt: Case) -> None:
    job, stream = rebuilt.job, rebuilt.stream
    with KeptInputs(memory_bytes=1 << 30) as kept:
        core = Rebuilder(
            stream, X, read_grids(rebuilt.grids), OPTIONS, seed=job.seed, micro_batch=MICRO_BATCH, kept=kept
        )
        expected: dict[str, QuantizedWeight] = {}
        for block, module in stream.stream(range(stream.num_blocks)):
            names = [spec.name for spec in stream.block_specs(block)]
            expected |= core(block, module, {name: rebuilt.codes[name] for name in names})
        assert kept.count == 0  # gradients go when their block is rebuilt
    assert any(outcome.accepted for outcome in core.outcomes)
    assert rebuild.read_outcomes(job, range(stream.num_blocks)) == core.outcomes
    store = open_store(job.stream.store)
    for spec in stream.specs:
        stored = read_codes(store, job.folder, spec, CHOICE)
        assert torch.equal(stored.codes, expected[spec.name].codes), spec.name
        assert torch.equal(stored.scales, expected[spec.name].scales), spec.name
    moved = rebuilt_with(rebuilt.grids, job.folder)
    assert moved.digest != rebuilt.grids.digest
    for ours, core_grids, start in zip(read_grids(moved), core.grids, read_grids(rebuilt.grids), strict=True):
        assert list(ours) == list(start)
        for place, grid in ours.items():
            assert grid_document(grid) == grid_document(core_grids[place])
            if place in ("qkv", "o", "up"):  # a step and a zero point as before: they are stored in that form
                assert zero_point(grid) == zero_point(start[place]) is not None  # type: ignore[arg-type]


def test_it_goes_on_where_it_was_interrupted_to_the_same_bytes(rebuilt: Case, tmp_path: Path) -> None:
    """Behind one whole block, and one of whose modules only some were stored."""
    before, after = Path(rebuilt.job.stream.store), tmp_path / "store"
    shutil.copytree(before, after)
    stream_job = replace(rebuilt.job.stream, store=str(after), activations=replace(rebuilt.grids, store=str(after)))
    job, last = replace(rebuilt.job, stream=stream_job), rebuilt.stream.num_blocks - 1
    assert rebuild.num_complete(job, last + 1) == last + 1
    (after / rebuilt_key(job.folder, last)).unlink()
    (after / job.folder.module(rebuilt.stream.block_specs(last)[-1].name)).unlink()
    assert rebuild.num_complete(job, last + 1) == last
    state = worker()
    state.run(rebuild.begin, job, last)
    with pytest.raises(RuntimeError, match=f"is at block {last}, asked for 0"):
        state.run(rebuild.rebuild, job, 0)
    state.clear()
    assert not state.held
    state.run(rebuild.begin, job, last)
    state.run(rebuild.rebuild, job, last)
    state.run(rebuild.end)
    for path in sorted((before / job.folder.prefix).iterdir()):
        assert (after / job.folder.prefix / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_damaged_object_is_refused_by_name(rebuilt: Case, tmp_path: Path) -> None:
    shutil.copytree(rebuilt.job.stream.store, tmp_path / "store")
    path = tmp_path / "store" / rebuilt_key(rebuilt.job.folder, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    moved = rebuilt_with(replace(rebuilt.grids, store=str(tmp_path / "store")), rebuilt.job.folder)
    with pytest.raises(StoreError, match="grids-000"):
        read_grids(moved)


def test_too_few_images_are_refused() -> None:
    held_out, training = divided(8, OPTIONS)
    assert (held_out.tolist(), training.tolist()) == ([3, 7], [0, 1, 2, 4, 5, 6])
    with pytest.raises(CalibrationError, match="holds out one of 4 images, and there are 3"):
        divided(3, OPTIONS)


def test_rebuilt_blocks_are_kept_where_they_are_better_on_images_that_nothing_saw() -> None:
    def scores(rebuilt: float) -> dict[str, dict[str, float]]:
        return {"rebuilt": {"kl_nats": rebuilt}, "rounded": {"kl_nats": 0.0038}}

    assert helps(scores(0.0037))
    assert not helps(scores(0.0038))
    assert not helps(scores(0.0059))
