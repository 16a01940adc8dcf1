"""Calibration and evaluation images: drawn, preprocessed, stored under their key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from flows.calibrate import STAGE, HeldOut, StoredWindows
from flows.config import CompressConfig
from flows.run import Run, step
from lrpq.errors import CalibrationError
from tasks.calibration.held_out import default_held_out
from tasks.images.draw import Drawn, draw, listing_digest
from tasks.images.folder import UNLABELLED, list_folder
from tasks.images.sources import FolderSource, parse_image_source
from tasks.images.stored import write_images


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """How many images each use takes, in this order of the source."""

    calibration: int
    held_out: int
    evaluation: int
    """Zero where nothing is measured."""
    apart: bool
    """Whether evaluation has a source of its own."""

    @property
    def used(self) -> int:
        """Images that are calibrated on or held out."""
        return self.calibration + self.held_out


def shares_of(config: CompressConfig) -> Shares:
    """What a configuration asks for."""
    asked = config.run.images
    held_out = config.run.calibration.held_out
    return Shares(
        calibration=asked.num_images,
        held_out=default_held_out(asked.num_images) if held_out is None else held_out,
        evaluation=config.evaluation.num_images if config.evaluation.enabled else 0,
        apart=config.evaluation_source() != asked.source,
    )


def check_images(config: CompressConfig, model_config: PreTrainedConfig) -> None:
    """Refuse folders that do not hold what is asked for; the hub's sets show it when they are read.

    Raises:
        LrpqError: no images, too few, classes that are not the model's, or no labels where top-1 is asked for.
    """
    shares, measured = shares_of(config), config.evaluation_source()
    asked = config.run.images.source
    assert asked is not None
    for name, wanted, needed in ((asked, measured == asked, shares.used), (measured, shares.apart, 0)):
        source = None if name is None else parse_image_source(name)
        if not isinstance(source, FolderSource):
            continue
        labelled = wanted and shares.evaluation > 0 and config.evaluation.top1 is not False
        files = list_folder(source.path, model_config, labelled=labelled)
        if len(files) < needed or (wanted and shares.evaluation and len(files) == needed):
            raise too_few(str(source), len(files), shares, measured=wanted)
        if labelled and config.evaluation.top1 and any(file.label == UNLABELLED for file in files):
            raise no_labels(str(source))


def too_few(source: str, found: int, shares: Shares, *, measured: bool) -> CalibrationError:
    """Not enough images for what they are needed for."""
    more = " and some to measure on" if measured and shares.evaluation else ""
    return CalibrationError(
        f"images {source}: holds {found}, and {shares.calibration} are to be calibrated on, {shares.held_out} held "
        f"out{more}; give more, fewer --calibration-images, or --evaluation FOLDER"
    )


def no_labels(source: str) -> CalibrationError:
    """Top-1 was asked for and cannot be measured."""
    return CalibrationError(
        f"images {source}: have no labels, which --top1 needs; put them into a folder a class, or leave --top1 out"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredImages:
    """Evaluation images in the store."""

    key: str
    digest: str
    num_images: int
    source: str
    labelled: bool


def calibration_images(
    run: Run, config: CompressConfig, *, model: Path, model_config: PreTrainedConfig, fingerprint: str
) -> StoredWindows:
    """The run's calibration images and those held out, drawn at random by the run's seed."""
    shares, name = shares_of(config), config.run.images.source
    assert name is not None
    folder = run.folder(
        STAGE,
        inputs={"model": fingerprint},
        parameters=_parameters(config, name) | {"images": shares.calibration, "held_out": shares.held_out},
        code=["tasks.images.draw", "tasks.images.stored"],
    )
    key, held_out_key = folder.object("images.safetensors"), folder.object("held-out.safetensors")
    extra = run.stored(folder, STAGE)
    if extra is None:
        drawn = _drawn(run, config, name, model, model_config, skip=0, count=shares.used, labelled=False, label=STAGE)
        if len(drawn.labels) < shares.used:
            raise too_few(name, len(drawn.labels), shares, measured=False)
        ours, rest = drawn.part(0, shares.calibration), drawn.part(shares.calibration, None)
        write_images(run.store, key, ours.pixels, ours.labels)
        if shares.held_out:
            write_images(run.store, held_out_key, rest.pixels, rest.labels)
        extra = run.finish(
            folder,
            STAGE,
            {
                "digest": ours.digest,
                "num_windows": shares.calibration,
                "held_out": shares.held_out,
                "held_out_digest": rest.digest if shares.held_out else None,
            },
        )
    beside: HeldOut | None = None
    if extra["held_out"]:
        beside = HeldOut(key=held_out_key, digest=extra["held_out_digest"], num_windows=int(extra["held_out"]))
    return StoredWindows(
        key=key, digest=extra["digest"], num_windows=int(extra["num_windows"]), source=name, held_out=beside
    )


def evaluation_images(
    run: Run, config: CompressConfig, *, model: Path, model_config: PreTrainedConfig, fingerprint: str
) -> MeasuredImages | None:
    """Images that nothing is calibrated on; None where nothing is measured.

    Raises:
        CalibrationError: no image is left, or none has a label and top-1 is asked for.
    """
    shares, name, label = shares_of(config), config.evaluation_source(), "evaluation images"
    if name is None:
        return None
    skip, wanted = (0 if shares.apart else shares.used), config.evaluation.top1
    folder = run.folder(
        STAGE,
        inputs={"model": fingerprint},
        parameters=_parameters(config, name)
        | {"skipped": skip, "measured": shares.evaluation, "labels": wanted is not False},
        code=["tasks.images.draw", "tasks.images.stored"],
    )
    key = folder.object("images.safetensors")
    extra = run.stored(folder, label)
    if extra is None:
        drawn = _drawn(
            run,
            config,
            name,
            model,
            model_config,
            skip=skip,
            count=shares.evaluation,
            labelled=wanted is not False,
            label=label,
        )
        write_images(run.store, key, drawn.pixels, drawn.labels)
        extra = run.finish(
            folder, label, {"digest": drawn.digest, "images": len(drawn.labels), "labelled": drawn.labelled}
        )
    if wanted and not extra["labelled"]:
        raise no_labels(name)
    if wanted is None and not extra["labelled"]:
        run.warn(f"images {name}: have no labels, so top-1 is not measured; KL divergence is")
    return MeasuredImages(
        key=key,
        digest=extra["digest"],
        num_images=int(extra["images"]),
        source=name,
        labelled=bool(extra["labelled"]) and wanted is not False,
    )


def _parameters(config: CompressConfig, name: str) -> dict[str, Any]:
    source = parse_image_source(name)
    return {"source": str(source), "seed": config.run.seed, "files": listing_digest(source)}


def _drawn(
    run: Run,
    config: CompressConfig,
    name: str,
    model: Path,
    model_config: PreTrainedConfig,
    *,
    label: str,
    **asked: Any,
) -> Drawn:
    with run.timed(label, 1, "draw"):
        source = parse_image_source(name)
        drawn: Drawn = step(label, lambda: draw(source, model, model_config, seed=config.run.seed, **asked))
        run.progress.advance(label)
    return drawn
