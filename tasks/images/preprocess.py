"""From the bytes of an image to what the model reads, by the model's own processor."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedConfig

from lrpq.errors import CalibrationError, ConfigError, ModelError
from lrpq.model.inputs import image_shape
from lrpq.model.safetensors_source import one_line

if TYPE_CHECKING:
    from jaxtyping import Float

PROCESSOR = "preprocessor_config.json"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name of what has so many channels."""


class Preprocessor:
    """Reads images for one model: Pillow decodes them, the model's processor resizes and normalises.

    Args:
        model: local folder.
        config: its configuration.

    Raises:
        ConfigError: Pillow is not installed.
        ModelError: the model has no processor that loads.
    """

    def __init__(self, model: Path, config: PreTrainedConfig) -> None:
        check_pillow()
        self.shape = image_shape(config)
        if self.shape[0] not in MODES:
            raise ModelError(f"model {model}: reads images of {self.shape[0]} channels; expected {sorted(MODES)}")
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(
                model, backend="pil", local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever the processor's own parser raises is a bad processor
            raise ModelError(
                f"model {model}: its image processor cannot be loaded from {PROCESSOR} ({one_line(error)})"
            ) from error

    def read(self, raw: bytes | Path, *, name: str) -> Float[Tensor, "channels height width"]:
        """One image, float32.

        Args:
            raw: its file, or the bytes of one.
            name: for messages.

        Raises:
            CalibrationError: it cannot be read, or has another size than the model reads and is not resized.
        """
        from PIL import Image, ImageOps

        try:
            with Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw) as opened:
                image = ImageOps.exif_transpose(opened).convert(MODES[self.shape[0]])
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise CalibrationError(f"image {name}: cannot be read ({one_line(error)}); remove or replace it") from error
        try:
            pixels = self._processor(images=[image], return_tensors="pt")["pixel_values"][0].float()
        except Exception as error:  # whatever a foreign processor raises
            raise CalibrationError(
                f"image {name}: the model's image processor fails on it ({one_line(error)})"
            ) from error
        if tuple(pixels.shape) != self.shape:
            width, height = image.size
            raise CalibrationError(
                f"image {name}: {width} x {height} becomes {list(pixels.shape)}, and the model reads "
                f"{list(self.shape)} (channels, height, width); let {PROCESSOR} resize, or give images of that size"
            )
        if not bool(torch.isfinite(pixels).all()):
            raise CalibrationError(f"image {name}: values are not finite behind the model's image processor")
        return pixels

    def read_all(self, items: Sequence[tuple[str, bytes | Path]]) -> Float[Tensor, "n channels height width"]:
        """Several, by name."""
        return torch.stack([self.read(raw, name=name) for name, raw in items])


def check_pillow() -> None:
    """Raises ConfigError where Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ConfigError("images are read with Pillow, which is not installed: pip install 'lrpq[images]'") from None
