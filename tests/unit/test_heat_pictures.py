"""Heat maps as files: every pixel of the PNG against its definition; names that any file system takes."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flows.heat_maps import HeatReport
from tasks.heat_maps import HeatMaps
from tasks.images.heat import GAP, HEIGHT, beside, png, stacked


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoded(raw: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(raw)) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image).astype(int)


def colour(value: float, largest: float) -> list[int]:
    """Red for what speaks for the class, blue against it, paler the less it does."""
    share = value / largest
    pale = round(255 * (1 - abs(share)))
    return [255, pale, pale] if share > 0 else [pale, pale, 255]


@pytest.mark.parametrize(
    ("channels", "patch", "size"), [(3, (4, 4), (16, 16)), (1, (2, 4), (9, 18)), (4, (8, 4), (8, 16))]
)
def test_every_pixel_is_the_images_or_its_patchs(channels: int, patch: tuple[int, int], size: tuple[int, int]) -> None:
    """Also behind the last whole patch, which is white, in greys, and with transparency, which is left out."""
    height, width = size
    pixels, patches = noise(channels, *size), noise(height // patch[0], width // patch[1], seed=1)
    found = decoded(png(beside(pixels, patches, patch_size=patch)))
    times = -(-HEIGHT // height)
    assert found.shape == (times * height, 2 * times * width + GAP, 3)
    assert (found[:, times * width : times * width + GAP] == 255).all()
    colours = pixels[:3]
    shown = 255 * (colours - colours.min()) / (colours.max() - colours.min())
    largest = float(patches.abs().max())
    for y in range(height):
        for x in range(width):
            square = found[times * y : times * (y + 1), times * x : times * (x + 1)]
            assert np.abs(square - shown[:, y, x].numpy()).max() <= 0.51  # one channel is three times the same
            right = found[times * y : times * (y + 1), times * (width + x) + GAP : times * (width + x + 1) + GAP]
            row, column = y // patch[0], x // patch[1]
            covered = row < patches.shape[0] and column < patches.shape[1]
            expected = colour(float(patches[row, column]), largest) if covered else [255, 255, 255]
            assert np.abs(right - np.array(expected)).max() <= 1


def test_nothing_to_see_is_white_and_black() -> None:
    """An image of one value, and patches of which none matters: no division by zero."""
    found = decoded(png(beside(torch.full((3, 300, 300), 2.5), torch.zeros(2, 2), patch_size=(150, 150))))
    assert found.shape == (300, 608, 3)  # not enlarged
    assert (found[:, :300] == 0).all()
    assert (found[:, 300:] == 255).all()


def report(names: dict[int, Any]) -> HeatReport:
    number = len(names)
    found = HeatMaps(
        pixels=noise(number, 3, 8, 8),
        classes=torch.arange(number),
        logits=noise(number),
        patches=noise(number, 2, 2),
        special=noise(number, 1, seed=3),
    )
    config: Any = SimpleNamespace(id2label=names, patch_size=4)
    return HeatReport(found=found, config=config, relevance="lrp")


def test_files_are_named_by_number_and_what_is_left_of_the_class(tmp_path: Path) -> None:
    names = {0: "../../etc/passwd", 1: "tench, Tinca tinca", 2: "金魚", 3: "x" * 300, 4: "a\0b\n$c$", 5: 7}
    made = report(names)
    entries = made.document["images"]
    assert [entry["file"] for entry in entries] == [
        "heat-maps/000-etc-passwd.png",
        "heat-maps/001-tench-tinca-tinca.png",
        "heat-maps/002.png",
        f"heat-maps/003-{'x' * 40}.png",
        "heat-maps/004-a-b-c.png",
        "heat-maps/005-7.png",
    ]
    assert [entry["name"] for entry in entries] == [str(name) for name in names.values()]
    made.write(tmp_path)
    paths = sorted((tmp_path / "heat-maps").iterdir())
    assert [f"heat-maps/{path.name}" for path in paths] == [entry["file"] for entry in entries]
    for i, (path, entry) in enumerate(zip(paths, entries, strict=True)):
        shown = beside(made.found.pixels[i], made.found.patches[i], patch_size=(4, 4))
        assert (decoded(path.read_bytes()) == shown.numpy()).all()
        assert entry["patches"] == pytest.approx(float(made.found.patches[i].sum()), rel=1e-6)
        assert entry["special_tokens"] == pytest.approx(float(made.found.special[i].sum()), rel=1e-6)
    before = [path.stat().st_mtime_ns for path in paths]
    paths[2].write_bytes(b"damaged")
    made.write(tmp_path)
    after = sorted((tmp_path / "heat-maps").iterdir())
    assert after == paths
    assert [path.stat().st_mtime_ns == was for path, was in zip(after, before, strict=True)] == [True] * 2 + [
        False,
        *[True] * 3,
    ]
    assert decoded(paths[2].read_bytes()).shape == (224, 456, 3)


def test_stacked_pictures_are_one_below_the_other() -> None:
    parts = [beside(noise(3, 8, 8, seed=i), noise(2, 2, seed=i), patch_size=(4, 4)) for i in range(3)]
    found = stacked(parts)
    for i, part in enumerate(parts):
        top = i * (len(part) + GAP)
        assert torch.equal(found[top : top + len(part)], part)
    assert len(found) == 3 * len(parts[0]) + 2 * GAP
