"""How many images each use takes, and whether a folder has them: what is known before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from flows.config import CompressConfig
from lrpq.errors import CalibrationError
from tasks.images.folder import UNLABELLED, list_folder
from tasks.images.sources import FolderSource, parse_image_source

HELD_OUT_SHARE = 2
"""One image held out for so many that are calibrated on: an image is one prediction, where a window of text has
hundreds, and most of the divergence lies in a few images."""


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
        held_out=-(-asked.num_images // HELD_OUT_SHARE) if held_out is None else held_out,
        evaluation=config.evaluation.num_images if config.evaluation.enabled else 0,
        apart=not _same(config.evaluation_source(), asked.source),
    )


def _same(measured: str | None, calibrated: str | None) -> bool:
    """Whether two names, as a user writes them, are of one source."""
    if measured is None or calibrated is None:
        return measured == calibrated
    ours, theirs = parse_image_source(measured), parse_image_source(calibrated)
    if isinstance(ours, FolderSource) and isinstance(theirs, FolderSource):
        return ours.path.resolve() == theirs.path.resolve()
    return ours == theirs


def check_images(config: CompressConfig, model_config: PreTrainedConfig) -> None:
    """Refuse folders that do not hold what is asked for; the hub's sets show it when they are read.

    Raises:
        LrpqError: no images, too few, none held out where blocks are rebuilt, classes that are not the model's, or no
            labels where top-1 is asked for.
    """
    shares, measured = shares_of(config), config.evaluation_source()
    asked = config.run.images.source
    assert asked is not None
    if config.plan.reconstruct and not shares.held_out:
        raise none_held_out()
    for name, wanted, needed in (
        (asked, measured is not None and not shares.apart, shares.used),
        (measured, shares.apart, 0),
    ):
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


def none_held_out() -> CalibrationError:
    """Blocks are to be rebuilt, and nothing could show whether that helps."""
    return CalibrationError(
        "--reconstruct is kept only where it helps on images that nothing was calibrated on, and none are held out; "
        "leave --held-out-windows 0 away"
    )
