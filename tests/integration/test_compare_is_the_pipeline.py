"""The row ``lrpq`` of a comparison is what ``lrpq compress`` writes: the same codes from the same windows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pipeline_case import Job, start_pool, start_server, write_model

from flows.config import PlanConfig
from flows.presets import FAST
from flows.run_config import RunConfig
from lrpq.checkpoint.stored import StoredCheckpoint
from lrpq.compare.prepared import Prepared
from lrpq.compare.recipes import CONTROL, DEFAULT, STITCHED
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.model.source import open_source
from lrpq.quant.grid import Grid
from lrpq.quant.sampled_cost import DEFAULT_ROWS
from tasks.calibration.stored import read_windows
from tasks.resources import CPU_WINDOWS, SHARDS
from tasks.store.opened import open_store

BUDGET = 3.5


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("same"))


def test_terms_and_recipe_are_the_defaults_of_compress() -> None:
    run, plan = RunConfig(model="m"), PlanConfig(budget_bits=BUDGET)
    terms = Terms()
    assert (terms.bits, terms.group_sizes) == (run.candidates.bits, run.candidates.group_sizes)
    assert (terms.grid, terms.damping) == (Grid(run.candidates.grid), run.candidates.damping)
    assert (terms.power, terms.floor, terms.seed) == (run.relevance_power, run.relevance_floor, run.seed)
    assert (run.shards, terms.shards, terms.micro_batch) == (None, SHARDS, CPU_WINDOWS)
    assert (DEFAULT.weighting, DEFAULT.polish_rounds) == (run.relevance, plan.polish)
    assert DEFAULT.row_blocks == plan.row_blocks
    assert (DEFAULT.correction, DEFAULT.correction_damping) == (plan.correction, plan.correction_damping)
    assert FAST["run.candidates.cost_rows"] == DEFAULT_ROWS


@pytest.mark.parametrize(("scales", "scale_bits"), [("bfloat16", 16), ("auto", 8)])
def test_the_codes_are_those_of_the_pipeline(job: Job, scales: str, scale_bits: int) -> None:
    model = write_model(job.folder / f"model-{scales}", ffn=256)  # two blocks of rows in gate and up
    changes = {
        "run__calibration__num_windows": 8,
        "run__candidates__group_sizes": list(Terms().group_sizes),
        "run__candidates__scales": scales,
    }
    found = job(model, scales, **changes, plan__budget_bits=BUDGET, evaluation__control=False)
    store = job.folder / "store"
    (path,) = store.glob(f"{found['run_id']}/calibrate/*/held-out.parquet")
    tokens = read_windows(open_store(str(store)), str(path.with_name("windows.parquet").relative_to(store)))
    terms = Terms(shards=4, micro_batch=2, scale_bits=scale_bits)
    bench = Workbench(open_source(model), tokens, terms).scaled()
    prepared = Prepared(bench, [DEFAULT, CONTROL], [BUDGET])
    codes = bench.codes(prepared.plan(DEFAULT.allocation, BUDGET).choices, DEFAULT, prepared.gathered)
    checkpoint = StoredCheckpoint(job.folder / scales)
    for spec in bench.stream().specs:
        stored = checkpoint.weight(spec, torch.bfloat16)
        assert stored is not None
        assert torch.equal(codes[spec.name].dequantize(torch.bfloat16), stored), spec.name
    stitched = bench.codes(prepared.plan(DEFAULT.allocation, BUDGET).choices, STITCHED, prepared.gathered)
    job(
        model,
        f"{scales}-stitched",
        **changes,
        plan__budget_bits=BUDGET,
        plan__refine="stitch",
        evaluation__control=False,
    )
    checkpoint = StoredCheckpoint(job.folder / f"{scales}-stitched")
    for spec in bench.stream().specs:
        stored = checkpoint.weight(spec, torch.bfloat16)
        assert stored is not None
        assert torch.equal(stitched[spec.name].dequantize(torch.bfloat16), stored), spec.name
    plain = bench.codes(prepared.plan(CONTROL.allocation, BUDGET).choices, CONTROL, prepared.gathered)
    assert any(not torch.equal(plain[name].codes, codes[name].codes) for name in codes)
    alone = bench.codes(
        prepared.plan(DEFAULT.allocation, BUDGET).choices, replace(DEFAULT, row_blocks=1), prepared.gathered
    )
    differ = {name.rsplit(".", 1)[-1] for name in codes if not torch.equal(alone[name].codes, codes[name].codes)}
    assert {"gate_proj", "up_proj"} & differ
