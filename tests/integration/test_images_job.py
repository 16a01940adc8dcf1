"""The main job on an image classifier: from a folder of PNG files to a checkpoint, all stages real."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import write_images, write_processor
from PIL import Image
from pipeline_case import Job, contents, snapshot, start_pool, start_server, stored_bits
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterTags
from test_main_job_killed import Striking, own_pool
from tiny_images import train_classifier, write_classifier
from transformers import AutoModelForImageClassification

from flows import cli, guard, reconstruction
from flows.compress import run_compress
from flows.config import CompressConfig
from lrpq.activations.calibrate import Means, calibrate
from lrpq.activations.operations import even_operations, operations
from lrpq.checkpoint.activations import TABLE, grid_document
from lrpq.classifier import load_classifier, read_classifier
from lrpq.compare.recipes import DEFAULT
from lrpq.compare.terms import Terms
from lrpq.compare.vision import QuantizedClassifier, quantize_classifier, uniform_bits
from lrpq.model.inputs import image_shape
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.relevance.patches import patch_relevance
from tasks.cluster import Pool
from tasks.images.draw import draw
from tasks.images.heat import beside, stacked
from tasks.images.sources import parse_image_source
from tasks.store.opened import open_store

CALIBRATION, HELD_OUT, MEASURED = 64, 32, 200
SWIN_CALIBRATION = 32
"""A micro-batch in each of eight shards: token weights have a floor that is a micro-batch's mean."""
WIDTHS = (3, 4, 5)
MICRO_BATCH = 4
MIXED = ("--activations", "3,4,5", "--held-out-windows", "0")
"""Without the guard: which of two good models is better on a few images would be left to chance."""

APART = ("--refine", "stitch", "--no-control", "--no-evaluate", "--heat-maps", "0", "--share", "none")
STAGES = ["profile", "activations", "candidates", "responses", "refine"]


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    start_server(request)
    return Job(start_pool(request), tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def model(job: Job) -> Path:
    return write_processor(train_classifier(job.folder / "model", "vit"))


@pytest.fixture(scope="module")
def images(job: Job) -> Path:
    return write_images(job.folder / "images", CALIBRATION + HELD_OUT + MEASURED)


def budget_of(model: Path) -> float:
    """All-in bits of the middle width everywhere."""
    return uniform_bits(BlockStream(open_source(model), dtype=torch.float32).specs, 4)


def command(job: Job, model: Path, images: Path, output: str, *more: str) -> list[str]:
    options = {
        "--images": str(images),
        "--calibration-images": str(CALIBRATION),
        "--evaluation-images": str(MEASURED),
        "--bits": ",".join(map(str, WIDTHS)),
        "--budget": repr(budget_of(model)),
        "--output": str(job.folder / output),
        "--store": str(job.folder / "store"),
        "--device": "cpu",
    }
    return ["compress", str(model), *(part for pair in options.items() for part in pair), *more]


def run(job: Job, arguments: list[str]) -> dict[str, Any]:
    """Through the command line, on the session's workers; the manifest."""
    with job.sharing():
        assert cli.run([*arguments, "--json"]) == 0
    folder = Path(arguments[arguments.index("--output") + 1])
    found: dict[str, Any] = json.loads((folder / "lrpq.json").read_text())
    return found


@pytest.fixture(scope="module")
def manifest(job: Job, model: Path, images: Path) -> dict[str, Any]:
    """Of weights and activations of 3, 4 or 5 bits, together no more than 4 bits take everywhere."""
    return run(job, command(job, model, images, "mixed", *MIXED))


@pytest.fixture(scope="module")
def in_process(job: Job, model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizedClassifier:
    """The same in one process."""
    source = open_source(model)
    drawn = draw(
        parse_image_source(str(images)), model, source.config, skip=0, count=CALIBRATION, seed=0, labelled=False
    )
    return quantize_classifier(
        source,
        drawn.pixels,
        weight_bits=WIDTHS,
        average_bits=4,
        activation_bits=WIDTHS,
        recipe=DEFAULT,
        folded=tmp_path_factory.mktemp("folded") / "model",
        terms=Terms(dtype=torch.float32, micro_batch=MICRO_BATCH),
    )


def test_the_codes_and_grids_are_those_of_one_process(
    job: Job, manifest: dict[str, Any], in_process: QuantizedClassifier
) -> None:
    stored = read_classifier(job.folder / "mixed")
    assert manifest["degraded"]["kept_uniform"] == 0
    assert "forecast" not in manifest  # what refinement leaves is known of language models
    assert stored.codes.keys() == in_process.codes.keys()
    for name, codes in in_process.codes.items():
        assert codes.choice == stored.codes[name].choice
        assert torch.equal(codes.codes, stored.codes[name].codes), name
        assert torch.equal(codes.scales, stored.codes[name].scales), name
    for ours, theirs in zip(stored.grids, in_process.grids, strict=True):
        assert {place: grid_document(grid) for place, grid in ours.items()} == {
            place: grid_document(grid) for place, grid in theirs.items()
        }


def test_gradients_are_walked_back_once(job: Job, manifest: dict[str, Any]) -> None:
    """On the original, for costs and roundings of every folded model; responses are another sweep."""
    kept = [path for path in snapshot(job.folder / "store") if f"{manifest['run_id']}/profile/" in path]
    assert len({Path(path).parent for path in kept}) == 1


def test_heat_maps_lie_beside_the_checkpoint_and_in_prefect(
    job: Job, model: Path, images: Path, manifest: dict[str, Any]
) -> None:
    """Of the original's likeliest classes, as the model explains its own logits; labels are not looked at."""
    source = open_source(model)
    drawn = draw(parse_image_source(str(images)), model, source.config, skip=0, count=4, seed=0, labelled=False)
    expected = patch_relevance(BlockStream(source, dtype=torch.float32), drawn.pixels)
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(model).eval()(pixel_values=drawn.pixels).logits
    assert manifest["heat_maps"]["relevance"] == "lrp"
    entries = manifest["heat_maps"]["images"]
    assert [entry["class"] for entry in entries] == logits.argmax(-1).tolist()
    assert len(list((job.folder / "mixed" / "heat-maps").iterdir())) == len(entries) == 4
    pictures = []
    for i, entry in enumerate(entries):
        assert entry["logit"] == pytest.approx(float(logits[i].max()), rel=1e-4)
        assert entry["patches"] == pytest.approx(float(expected.patches[i].sum()), rel=1e-3)
        assert entry["special_tokens"] == pytest.approx(float(expected.special[i].sum()), rel=1e-3)
        with Image.open(job.folder / "mixed" / entry["file"]) as opened:
            shown = torch.from_numpy(np.array(opened))
        picture = beside(drawn.pixels[i], expected.patches[i], patch_size=(4, 4))
        assert int((shown.int() - picture.int()).abs().max()) <= 1
        pictures.append(shown)
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["heat-maps"])),
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[f"run:{manifest['run_id']}"])),
        )
    raw = base64.b64decode(str(found[0].data).removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(raw)) as opened:
        assert torch.equal(torch.from_numpy(np.array(opened)), stacked(pictures))


@pytest.fixture(scope="module")
def values(model: Path) -> dict[tuple[int, str], int]:
    """Activations an image, by place."""
    stream = BlockStream(open_source(model), dtype=torch.float32)
    blank = torch.rand(2, *image_shape(stream.source.config))
    return {key: p.num_values for key, p in calibrate(stream, blank, widths=[8], means=Means.NONE).places.items()}


def widths_of(manifest: dict[str, Any]) -> dict[tuple[int, str], int]:
    return {(place["block"], place["place"]): place["bits"] for place in manifest["activations"]["places"]}


def test_weights_and_activations_keep_one_budget(
    job: Job, model: Path, manifest: dict[str, Any], values: dict[tuple[int, str], int]
) -> None:
    """What the weights take in the files and the activations of an image, together; they share it as they need it."""
    bits, weights = stored_bits(job.folder / "mixed")
    assert manifest["budget"]["reached_bits"] == bits / weights
    assert {3, 4} <= {module["bits"] for module in manifest["modules"]} <= {3, 4, 5}
    assert {module["group_size"] for module in manifest["modules"]} == {-1}
    widths = widths_of(manifest)
    assert widths.keys() == values.keys()
    assert {4, 5} <= set(widths.values()) <= {3, 4, 5}
    taken = sum(width * values[key] for key, width in widths.items())
    shared = manifest["activations"]["shared"]
    assert shared["unit"] == "bits"
    assert shared["spent"] == bits + taken
    assert 0.99 * shared["budget"] < shared["spent"] <= shared["budget"]
    assert shared["budget"] == int(Fraction(repr(budget_of(model))) * weights) + 4 * sum(values.values())
    assert manifest["activations"]["average_bits"] == pytest.approx(taken / sum(values.values()))
    assert manifest["activations"]["average_bits"] > 4
    assert bits / weights < budget_of(model), "less than at the middle width, scales counted in both"


def test_weights_and_activations_keep_to_their_own_averages(
    job: Job, model: Path, images: Path, manifest: dict[str, Any]
) -> None:
    """Where they are told to; nothing is asked of predictions then."""
    found = run(job, [*command(job, model, images, "apart", *MIXED), *APART])
    bits, weights = stored_bits(job.folder / "apart")
    assert bits / weights <= budget_of(model)
    assert set(widths_of(found).values()) == {3, 4, 5}
    assert found["activations"]["average_bits"] <= 4
    assert "shared" not in found["activations"]
    assert "responses" not in found["seconds"]


def test_bit_operations_are_a_budget_too(
    job: Job, model: Path, images: Path, manifest: dict[str, Any], values: dict[tuple[int, str], int]
) -> None:
    """As many as with four bits everywhere, of which the projections are the larger part."""
    arguments = [*command(job, model, images, "operations", *MIXED), *APART[:-1], "operations", "--budget", "4"]
    found = run(job, arguments)
    shared = found["activations"]["shared"]
    stream = BlockStream(open_source(model), dtype=torch.float32)
    blank = torch.rand(2, *image_shape(stream.source.config))
    counted = calibrate(stream, blank, widths=[8], means=Means.NONE)
    chosen = {module["name"]: module["bits"] for module in found["modules"]}
    assert shared["spent"] == operations(counted, stream.specs, widths_of(found), chosen) <= shared["budget"]
    assert shared["budget"] == even_operations(counted, stream.specs, weight_bits=4, activation_bits=4)
    assert "responses" in found["reused"]
    assert "candidates" not in found["reused"]
    assert not found["computed_nothing"]


def test_an_impossible_shared_budget_is_refused_with_the_smallest_possible(
    job: Job, model: Path, images: Path, manifest: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Before candidates are made; what is named works as it stands."""
    arguments = [*command(job, model, images, "least", *MIXED), *APART[:-2], "--keep", "*=5"]
    with job.sharing():
        assert cli.run([*arguments, "--budget", "3"]) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    found = re.search(r"the smallest possible is (\d+\.\d{4}) bits; raise --budget", message)
    assert found
    assert not (job.folder / "least").exists()
    least = run(job, [*arguments, "--budget", found[1]])
    assert set(widths_of(least).values()) == {3}
    assert {module["bits"] for module in least["modules"]} == {5}


def test_the_even_candidate_has_grids_and_folds_of_its_own(
    job: Job,
    model: Path,
    images: Path,
    manifest: dict[str, Any],
    values: dict[tuple[int, str], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the guard writes when it does not like the plan is what it has measured: four bits everywhere."""
    monkeypatch.setattr(guard, "better", lambda scores, of: guard.UNIFORM)
    arguments = [*command(job, model, images, "even", *MIXED[:2]), *APART[:-2], "--held-out-windows", str(HELD_OUT)]
    found = run(job, [argument for argument in arguments if argument != "--no-evaluate"])
    assert found["degraded"]["kept_uniform"] == 1
    assert set(widths_of(found).values()) == {4}
    stored = read_classifier(job.folder / "even")
    assert {codes.choice.bits for codes in stored.codes.values()} == {4}
    bits, _ = stored_bits(job.folder / "even")
    shared = found["activations"]["shared"]
    assert shared["spent"] == bits + 4 * sum(values.values()) <= shared["budget"]
    assert "cost_nats" not in shared
    costs = [module["cost_nats"] for module in found["modules"]]
    assert sum(costs) == pytest.approx(found["budget"]["predicted_kl_nats"])
    assert {grid.bits for block in stored.grids for grid in block.values()} == {4}
    drawn = draw(
        parse_image_source(str(images)),
        model,
        open_source(model).config,
        skip=CALIBRATION,
        count=HELD_OUT,
        seed=0,
        labelled=False,
    )
    with torch.no_grad():
        p = AutoModelForImageClassification.from_pretrained(model).eval()(pixel_values=drawn.pixels).logits
        q = load_classifier(job.folder / "even")(pixel_values=drawn.pixels).logits
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert found["guard"]["uniform"]["kl_nats"] == pytest.approx(kl, rel=0.02)


def test_what_is_measured_is_what_the_checkpoint_computes(
    job: Job, model: Path, images: Path, manifest: dict[str, Any]
) -> None:
    """On images that were neither calibrated on nor held out, with the model's own forward."""
    source = open_source(model)
    drawn = draw(
        parse_image_source(str(images)),
        model,
        source.config,
        skip=CALIBRATION,
        count=MEASURED,
        seed=0,
        labelled=True,
    )
    assert drawn.labelled
    with torch.no_grad():
        original = AutoModelForImageClassification.from_pretrained(model).eval()(pixel_values=drawn.pixels).logits
        ours = load_classifier(job.folder / "mixed")(pixel_values=drawn.pixels).logits
    found = manifest["evaluation"]
    assert found["images"] == MEASURED
    for name, logits in (("reference", original), ("lrpq", ours)):
        assert found[name]["top1"] == pytest.approx(
            float((logits.argmax(-1) == drawn.labels).double().mean()), abs=0.006
        )
    assert found["reference"]["top1"] > 0.9
    assert found["lrpq"]["top1"] > found["reference"]["top1"] - 0.06
    assert 0 < found["lrpq"]["kl_nats"] < found["control"]["kl_nats"]
    assert found["control"]["label"] == "uniform GPTQ 4b/channel A4"
    p, q = original.double().log_softmax(-1), ours.double().log_softmax(-1)
    assert found["lrpq"]["kl_nats"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.05)


def test_the_same_command_computes_nothing(job: Job, model: Path, images: Path, manifest: dict[str, Any]) -> None:
    before = snapshot(job.folder / "store"), (job.folder / "mixed" / "model.safetensors").read_bytes()
    again = run(job, command(job, model, images, "mixed", *MIXED))
    assert again["computed_nothing"]
    assert {"calibrate", "evaluation images", "heat-maps", "profile", "activations", "candidates", "refine"} < set(
        again["reused"]
    )
    assert again["evaluation"] == manifest["evaluation"]
    assert (snapshot(job.folder / "store"), (job.folder / "mixed" / "model.safetensors").read_bytes()) == before


def test_a_damaged_grid_is_refused_by_name(job: Job, model: Path, images: Path, manifest: dict[str, Any]) -> None:
    store = open_store(str(job.folder / "store"))
    (key,) = [key for key in store.list(f"{manifest['run_id']}/activations") if key.endswith("grids-001.safetensors")]
    path = job.folder / "store" / key
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with job.sharing():
        assert cli.run(command(job, model, images, "damaged", *MIXED)) == 2
    assert not (job.folder / "damaged").exists()
    path.write_bytes(whole)


def test_weights_alone_load_with_transformers(job: Job, model: Path, images: Path) -> None:
    """Without labels the divergence is all that is measured, and that is said."""
    flat = write_images(job.folder / "flat", CALIBRATION + HELD_OUT + 20, labelled=False)
    found = run(job, command(job, model, flat, "weights", "--refine", "stitch", "--no-control"))
    assert any("no labels, so top-1 is not measured" in text for text in found["warnings"])
    assert found["evaluation"]["lrpq"]["top1"] is None
    assert found["evaluation"]["images"] == 20
    assert "activations" not in found
    assert found["guard"]["windows"] == HELD_OUT
    assert found["guard"]["lrpq"]["difference_standard_error"] > 0
    loaded = AutoModelForImageClassification.from_pretrained(job.folder / "weights").eval()
    drawn = draw(
        parse_image_source(str(flat)),
        model,
        open_source(model).config,
        skip=CALIBRATION + HELD_OUT,
        count=20,
        seed=0,
        labelled=False,
    )
    with torch.no_grad():
        p = AutoModelForImageClassification.from_pretrained(model).eval()(pixel_values=drawn.pixels).logits
        q = loaded(pixel_values=drawn.pixels).logits
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    assert found["evaluation"]["lrpq"]["kl_nats"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.02)


def narrow(job: Job, model: Path, images: Path, output: str, *more: str) -> list[str]:
    """Stitched candidates of 3 bits, on whose errors there is something to gain; ``manifest`` has stored them."""
    bits = uniform_bits(BlockStream(open_source(model), dtype=torch.float32).specs, 3)
    return [
        *command(job, model, images, output, *MIXED[:2], "--refine", "stitch", "--no-control", *more),
        *("--held-out-windows", str(HELD_OUT), "--budget", repr(bits)),
    ]


@pytest.fixture(scope="module")
def stitched(job: Job, model: Path, images: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    return run(job, narrow(job, model, images, "stitched"))


@pytest.fixture(scope="module")
def rebuilt(job: Job, model: Path, images: Path, stitched: dict[str, Any]) -> dict[str, Any]:
    """Written whether it helps or not: what is written is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "helps", lambda scores: True)
        return run(job, narrow(job, model, images, "rebuilt", "--reconstruct"))


def test_rebuilt_blocks_are_what_is_written(
    job: Job, model: Path, images: Path, stitched: dict[str, Any], rebuilt: dict[str, Any]
) -> None:
    """No block is worse on the images held out of it (others may show otherwise); the loader's logits are measured."""
    assert "reconstruction" not in stitched
    assert {"candidates", "activations", "profile"} < set(rebuilt["reused"])
    assert rebuilt["seconds"]["rebuild"] > 0
    found = rebuilt["reconstruction"]
    assert found["written"]
    assert found["num_blocks"] == len(found["blocks"]) == 2
    assert found["changed"] == sum(block["changed"] for block in found["blocks"]) > 0
    assert rebuilt["degraded"]["reconstruction_diverged"] == found["diverged"] == 0
    assert all(block["after"] <= block["before"] for block in found["blocks"])
    assert all(block["kl_after"] <= block["kl_before"] for block in found["blocks"])
    ours, plain = read_classifier(job.folder / "rebuilt"), read_classifier(job.folder / "stitched")
    assert {name: codes.choice for name, codes in ours.codes.items()} == {
        name: codes.choice for name, codes in plain.codes.items()
    }
    moved = [name for name, codes in ours.codes.items() if not torch.equal(codes.codes, plain.codes[name].codes)]
    changed = [block["block"] for block in found["blocks"] if block["changed"]]
    specs = BlockStream(open_source(model), dtype=torch.float32).specs
    assert {spec.block for spec in specs if spec.name in moved} == set(changed)
    grids = [
        [{place: grid_document(grid) for place, grid in block.items()} for block in stored.grids]
        for stored in (ours, plain)
    ]
    assert [block for block in range(2) if grids[0][block] != grids[1][block]] == changed
    drawn = draw(
        parse_image_source(str(images)),
        model,
        open_source(model).config,
        skip=CALIBRATION + HELD_OUT,
        count=MEASURED,
        seed=0,
        labelled=True,
    )
    with torch.no_grad():
        p = AutoModelForImageClassification.from_pretrained(model).eval()(pixel_values=drawn.pixels).logits
        q = load_classifier(job.folder / "rebuilt")(pixel_values=drawn.pixels).logits
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert rebuilt["evaluation"]["lrpq"]["kl_nats"] == pytest.approx(kl, rel=0.05)


def test_rebuilt_blocks_that_do_not_help_are_left_as_they_were_rounded(
    job: Job, model: Path, images: Path, rebuilt: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images, so the same divergences, and the other decision."""
    monkeypatch.setattr(reconstruction, "helps", lambda scores: False)
    found = run(job, narrow(job, model, images, "rounded", "--reconstruct"))
    assert found["reconstruction"] == {**rebuilt["reconstruction"], "helps": False, "written": False}
    assert any("they are left as they were rounded" in text for text in found["warnings"])
    assert "rebuild" in found["reused"]
    codes, plain = (read_classifier(job.folder / name).codes for name in ("rounded", "stitched"))
    assert all(torch.equal(codes[name].codes, plain[name].codes) for name in plain)


def test_what_was_rebuilt_is_found_again(
    job: Job, model: Path, images: Path, rebuilt: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruction, "helps", lambda scores: True)
    before = snapshot(job.folder / "store")
    again = run(job, narrow(job, model, images, "rebuilt", "--reconstruct"))
    assert again["computed_nothing"]
    assert "rebuild" in again["reused"]
    assert again["reconstruction"] == rebuilt["reconstruction"]
    assert again["evaluation"] == rebuilt["evaluation"]
    assert snapshot(job.folder / "store") == before


@pytest.fixture(scope="module")
def mortal(job: Job) -> Iterator[Pool]:
    """Workers beside the session's, on the same Ray."""
    pool = own_pool()
    yield pool
    for worker in list(pool.workers):
        pool._drop(worker, "the tests are done")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "after"), [("profile", 4), ("activations", 0), ("responses", 0)])
def test_a_killed_worker_costs_no_byte(
    job: Job, mortal: Pool, manifest: dict[str, Any], stage: str, after: int
) -> None:
    """Buys: a worker process that is killed in the backward sweep that grids and weights share, and in the search of
    grids and the sweeps behind a shared budget, which no language model has."""
    store = job.folder / f"store-{stage}"
    later = STAGES[STAGES.index(stage) :]
    shutil.copytree(job.folder / "store", store, ignore=lambda _, names: [name for name in names if name in later])
    config = CompressConfig.model_validate_json(
        json.dumps(
            {
                **manifest["configuration"],
                "evaluation": {"enabled": False},
                "output": str(job.folder / f"killed-{stage}"),
                "store": str(store),
            }
        )
    )
    progress = Striking(mortal, stage, after, signal.SIGKILL)
    found = run_compress(config, progress, pool=mortal)
    assert progress.struck
    assert stage not in progress.reused
    assert any(text.startswith(f"{stage}: a worker was lost") for text in found["warnings"])
    names = ("*.safetensors", "config.json", TABLE, "heat-maps/*")
    assert contents(job.folder / f"killed-{stage}", names) == contents(job.folder / "mixed", names)


def test_merged_stages_go_through_the_job(job: Job, images: Path) -> None:
    """A Swin, whose merging of patches is a block that is folded too; code for code as in one process."""
    model = write_processor(write_classifier(job.folder / "swin", "swin"))
    found = run(
        job,
        [
            *command(job, model, images, "swin-out", *MIXED, "--no-evaluate", "--heat-maps", "2"),
            *("--calibration-images", str(SWIN_CALIBRATION)),
        ],
    )
    source = open_source(model)
    drawn = draw(
        parse_image_source(str(images)), model, source.config, skip=0, count=SWIN_CALIBRATION, seed=0, labelled=False
    )
    expected = quantize_classifier(
        source,
        drawn.pixels,
        weight_bits=WIDTHS,
        average_bits=4,
        activation_bits=WIDTHS,
        recipe=DEFAULT,
        folded=job.folder / "swin-folded",
        terms=Terms(dtype=torch.float32, micro_batch=MICRO_BATCH),
    )
    stored = read_classifier(job.folder / "swin-out")
    assert any(name.endswith("reduction") for name in stored.codes)
    assert stored.codes.keys() == expected.codes.keys()
    for name, codes in expected.codes.items():
        assert codes.choice == stored.codes[name].choice
        assert torch.equal(codes.codes, stored.codes[name].codes), name
    for ours, theirs in zip(stored.grids, expected.grids, strict=True):
        assert {place: grid_document(grid) for place, grid in ours.items()} == {
            place: grid_document(grid) for place, grid in theirs.items()
        }
    assert len(found["heat_maps"]["images"]) == 2
    with Image.open(job.folder / "swin-out" / found["heat_maps"]["images"][0]["file"]) as shown:
        assert shown.size == (2 * 224 + 8, 224)
