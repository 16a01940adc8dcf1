"""Options that only one kind of model has: language models read text, image classifiers images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flows.presets import FAST
from lrpq.errors import ConfigError

if TYPE_CHECKING:
    from flows.config import CompressConfig

OF_TEXT = (
    "run.calibration.source",
    "run.calibration.num_windows",
    "run.calibration.length",
    "run.calibration.text_column",
    "run.candidates.cost_rows",
    "run.candidates.quantize_head",
    "run.candidates.quantize_embeddings",
    "run.gradients_every",
    "run.rotate",
    "plan.max_kl",
    "plan.codes",
    "plan.target",
    "plan.format",
    "plan.tensor_parallel",
    "evaluation.num_windows",
    "evaluation.length",
    "evaluation.forecast",
)
"""Fields that mean nothing for images, or that nobody has built for them."""
OF_IMAGES = (
    "run.images.num_images",
    "run.images.activations",
    "plan.share",
    "plan.reconstruct",
    "evaluation.num_images",
    "evaluation.top1",
    "evaluation.heat_maps",
)
INSTEAD = {
    "run.calibration.source": "--images",
    "run.calibration.num_windows": "--calibration-images",
    "evaluation.num_windows": "--evaluation-images",
}
"""What an image classifier has in their place."""


def check_kind(config: CompressConfig) -> None:
    """Refuse settings of the other kind of model; those that say what is so anyway pass.

    Raises:
        ConfigError: the option is named.
    """
    if config.run.images.source is None:
        for path in _changed(config, OF_IMAGES):
            raise ConfigError(f"{_option(config, path)}: is for image classifiers; give their images with --images")
        return
    for path in _changed(config, OF_TEXT):
        instead = INSTEAD.get(path)
        implied = " (--fast implies it)" if path in FAST else ""
        raise ConfigError(
            f"{_option(config, path)}{implied} with --images: is for language models"
            + (f"; an image classifier takes {instead}" if instead else "; leave it out")
        )
    if config.run.candidates.scales == "float8":
        raise ConfigError("--scales float8 with --images: is for language models; leave it out")
    if config.plan.share == "operations" and len(config.run.images.activations) < 2:
        raise ConfigError("--share operations: there is nothing to share; give several widths as --activations")
    if config.run.images.activations and config.plan.budget_bytes is not None:
        raise ConfigError("--budget-bytes with --activations: give --budget BITS")


def _changed(config: CompressConfig, paths: tuple[str, ...]) -> Iterator[str]:
    for path in paths:
        section, name = _at(config, path)
        if getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True):
            yield path


def _option(config: CompressConfig, path: str) -> str:
    section, name = _at(config, path)
    flags = [item for item in type(section).model_fields[name].metadata if hasattr(item, "off")]
    return str(flags[0].name) if flags else path


def _at(config: CompressConfig, path: str) -> tuple[Any, str]:
    *sections, name = path.split(".")
    found: Any = config
    for section in sections:
        found = getattr(found, section)
    return found, name
