"""A heat map as a picture: the image, and beside it the relevance of its patches.

Red speaks for the class, blue against it, white for neither; each map has its own scale, the largest absolute value.
What lies behind the last whole patch is white. The image is what the model reads, stretched to its own darkest and
lightest value: the preprocessing is not undone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from torch import Tensor

HEIGHT = 224
"""Of a shown image at least, unless it is higher itself; small ones are enlarged by a whole number."""
GAP = 8
"""White columns or rows between two pictures."""
WHITE = 255


def beside(
    pixels: Float[Tensor, "channels height width"],
    patches: Float[Tensor, "rows columns"],
    *,
    patch_size: tuple[int, int],
) -> UInt8[Tensor, "tall wide colours=3"]:
    """The image and its heat map, side by side."""
    times = max(1, -(-HEIGHT // pixels.shape[1]))
    image, heat = _enlarged(_stretched(pixels), times), _enlarged(_heat(patches, patch_size, pixels.shape[1:]), times)
    gap = torch.full((len(image), GAP, 3), WHITE, dtype=torch.uint8)
    return torch.cat([image, gap, heat], dim=1)


def stacked(pictures: Sequence[UInt8[Tensor, "tall wide colours=3"]]) -> UInt8[Tensor, "sum wide colours=3"]:
    """Pictures of one size, one below the other."""
    gap = torch.full((GAP, pictures[0].shape[1], 3), WHITE, dtype=torch.uint8)
    return torch.cat([part for shown in pictures for part in (gap, shown)][1:])


def png(shown: UInt8[Tensor, "tall wide colours=3"]) -> bytes:
    """As a file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(shown.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _stretched(pixels: Float[Tensor, "channels height width"]) -> UInt8[Tensor, "height width colours=3"]:
    """Colours of an image; of one channel greys, of four the transparency left out."""
    colours = pixels.float()[:3].expand(3, -1, -1) if len(pixels) == 1 else pixels.float()[:3]
    low, high = colours.amin(), colours.amax()
    share = (colours - low) / torch.where(high > low, high - low, 1.0)
    return (255 * share).round().to(torch.uint8).permute(1, 2, 0)


def _heat(
    patches: Float[Tensor, "rows columns"], patch_size: tuple[int, int], size: torch.Size
) -> UInt8[Tensor, "height width colours=3"]:
    largest = patches.abs().amax()
    share = patches.float() / torch.where(largest > 0, largest, 1.0)
    faded = 255 * (1 - share.abs())
    full = torch.full_like(faded, 255)
    red, blue = torch.where(share >= 0, full, faded), torch.where(share <= 0, full, faded)
    colours = torch.stack([red, faded, blue], dim=-1).round().to(torch.uint8)
    tall, wide = patch_size
    covered = colours.repeat_interleave(tall, dim=0).repeat_interleave(wide, dim=1)[: size[0], : size[1]]
    heat = torch.full((*size, 3), WHITE, dtype=torch.uint8)
    heat[: covered.shape[0], : covered.shape[1]] = covered
    return heat


def _enlarged(colours: UInt8[Tensor, "height width colours=3"], times: int) -> UInt8[Tensor, "tall wide colours=3"]:
    return colours.repeat_interleave(times, dim=0).repeat_interleave(times, dim=1)
