"""What a model's forward is called with: a batch of token windows, or of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from lrpq.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor


def text_arguments(tokens: Tensor) -> dict[str, Any]:
    """Of a causal language model; ``tokens`` are ids [n, t]."""
    return {"input_ids": tokens, "use_cache": False, "logits_to_keep": 1}


def image_arguments(images: Tensor, config: PreTrainedConfig) -> dict[str, Any]:
    """Of an image classifier; ``images`` [n, channels, height, width] are normalised as its preprocessor does it.

    Raises:
        CalibrationError: the images do not have the size that the model reads.
    """
    wanted = image_shape(config)
    if tuple(images.shape[1:]) != wanted:
        raise CalibrationError(
            f"images of shape {list(images.shape[1:])}: the model reads {list(wanted)} (channels, height, width); "
            "resize them as its preprocessor_config.json says"
        )
    return {"pixel_values": images}


def image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width of the images that a classifier reads."""
    size = config.image_size
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(config.num_channels), int(height), int(width)
