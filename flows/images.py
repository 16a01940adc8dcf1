"""Calibration and evaluation images: drawn, preprocessed, stored under their key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from flows.calibrate import STAGE, HeldOut, StoredWindows
from flows.config import CompressConfig
from flows.image_shares import no_labels, shares_of, too_few
from flows.run import Run
from tasks.images.draw import Drawn, draw, listing_digest
from tasks.images.sources import parse_image_source
from tasks.images.stored import write_images


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
            folder,
            label,
            {
                "digest": drawn.digest,
                "images": len(drawn.labels),
                "labelled": drawn.labelled,
                "classes": len(drawn.labels.unique()),
            },
        )
    if wanted and not extra["labelled"]:
        raise no_labels(name)
    num_classes, found = int(model_config.num_labels), int(extra["classes"])
    if extra["labelled"] and 2 * found < min(num_classes, int(extra["images"])):
        run.warn(
            f"images {name}: {extra['images']} that are measured are of {found} of {num_classes} classes; where a data "
            "set is sorted by class, top-1 says little"
        )
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
        drawn: Drawn = run.step(label, lambda: draw(source, model, model_config, seed=config.run.seed, **asked))
        run.progress.advance(label)
    return drawn
