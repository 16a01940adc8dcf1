"""Bad images and settings of the other kind of model: one line, exit code 2, nothing written; no worker is started."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_llama
from image_folders import as_image, write_images, write_processor
from PIL import Image
from pipeline_case import Silent
from tiny_images import write_classifier

from flows import cli
from flows.config import CompressConfig
from flows.image_compression import ImageCompression
from lrpq.errors import BudgetError, CalibrationError, ConfigError
from lrpq.model.source import open_source
from tasks.images.draw import draw, listing_digest
from tasks.images.folder import list_folder
from tasks.images.labels import class_indices
from tasks.images.preprocess import Preprocessor
from tasks.images.sources import FolderSource, parse_image_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images-errors")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return write_processor(write_classifier(folder / "vit", "vit"))


@pytest.fixture(scope="module")
def images(folder: Path) -> Path:
    return write_images(folder / "images", 12)


@pytest.fixture
def refused(
    model: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Runs a command that must be refused before the flow starts; returns its one line."""
    monkeypatch.setattr("flows.compress.run_compress", lambda *_, **__: pytest.fail("the flow was started"))

    def run(
        *more: str, model: Path = model, images: Path | None = images, budget: tuple[str, ...] = ("--budget", "4.5")
    ) -> str:
        given = [] if images is None else ["--images", str(images)]
        where = ["--output", str(tmp_path / "out"), "--store", str(tmp_path / "store"), *budget]
        capfd.readouterr()
        assert cli.run(["compress", str(model), *where, *given, *more]) == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert not (tmp_path / "out").exists()
        return line

    return run


FEW = ("--calibration-images", "8", "--held-out-windows", "2")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--length", "64"], "--length with --images: is for language models; leave it out"),
        (["--calibration", "pydoc:calibrate"], "an image classifier takes --images"),
        (["--calibration-windows", "8"], "--calibration-windows with --images: is for language models; an image"),
        (["--evaluation-windows", "8"], "takes --evaluation-images"),
        (["--rotate", "hadamard"], "--rotate with --images"),
        (["--quantize-head", "8"], "--quantize-head with --images"),
        (["--format", "gptq"], "--format with --images"),
        (["--target", "vllm"], "--target with --images"),
        (["--fast"], "with --images: is for language models"),
        (["--activations", "3,4"], "3, 4 have no middle width"),
        (["--activations", "9"], "9 is not one of"),
        (["--activations", "4", "--share", "operations"], "there is nothing to share"),
        (["--heat-maps", "-1"], "--heat-maps: expected"),
        (["--activations", "4", "--group-size", "64"], "one scale a row"),
        (["--activations", "4", "--dtype", "bfloat16"], "folded in float32"),
    ],
)
def test_settings_that_do_not_go_with_images(refused: Any, option: list[str], expected: str) -> None:
    assert expected in refused(*option)


def test_budgets_that_do_not_go_with_images(refused: Any) -> None:
    assert "--max-kl with --images" in refused("--max-kl", "0.1", budget=())
    bytes_of_all = ("--budget-bytes", "1GB")
    assert "give --budget BITS" in refused("--activations", "4", "--group-size", "channel", budget=bytes_of_all)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--activations", "4"], "--activations: is for image classifiers; give their images with --images"),
        (["--evaluation-images", "8"], "--evaluation-images: is for image classifiers"),
        (["--top1"], "--top1: is for image classifiers"),
        (["--heat-maps", "2"], "--heat-maps: is for image classifiers"),
        (["--share", "none"], "--share: is for image classifiers"),
        (["--reconstruct"], "--reconstruct: is for image classifiers; give their images with --images"),
    ],
)
def test_settings_that_need_images(refused: Any, option: list[str], expected: str) -> None:
    text = ["--calibration", "pydoc:calibrate"]
    assert expected in refused(*text, *option, images=None)


def test_each_kind_of_model_is_told_from_the_other(refused: Any, tmp_path: Path) -> None:
    text = refused("--calibration", "pydoc:calibrate", images=None)
    assert "ViTForImageClassification classifies images: give images to calibrate on with --images" in text
    assert "LlamaForCausalLM is no image classifier" in refused(model=write_llama(tmp_path / "llama"))


def test_folders_that_do_not_hold_what_is_needed(refused: Any, model: Path, images: Path, tmp_path: Path) -> None:
    assert "no such folder" in refused(images=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no image files" in refused(images=tmp_path / "empty")
    assert "holds 12, and 64 are to be calibrated on, 32 held out" in refused("--calibration-images", "64")
    assert "and some to measure on" in refused("--calibration-images", "10", "--held-out-windows", "2")
    assert "none are held out" in refused("--calibration-images", "8", "--held-out-windows", "0", "--reconstruct")
    flat = write_images(tmp_path / "flat", 12, labelled=False)
    assert "have no labels, which --top1 needs" in refused(*FEW, "--top1", images=flat)
    strange = tmp_path / "strange"
    shutil.copytree(images, strange)
    shutil.copytree(strange / "LABEL_0", strange / "zebra", dirs_exist_ok=True)
    assert "class 'zebra' is none of the model's" in refused(*FEW, images=strange)
    shutil.copy(next((images / "LABEL_0").iterdir()), strange / "loose.png")
    shutil.rmtree(strange / "zebra")
    assert "loose.png lies beside class folders" in refused(*FEW, images=strange)
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "preprocessor_config.json").unlink()
    assert "its image processor cannot be loaded" in refused(*FEW, model=bare)


def test_classes_are_told_by_all_names_or_by_none() -> None:
    def indices(known: dict[str, int], *names: str) -> dict[str, int]:
        return class_indices(names, SimpleNamespace(label2id=known, num_labels=len(known)), source="here")

    animals = {"dog": 0, "cat": 1}
    assert indices(animals, "cat", "dog") == animals
    assert indices(animals, "b", "a") == {"a": 0, "b": 1}
    with pytest.raises(CalibrationError, match="class 'cats' is none of the model's"):
        indices(animals, "cats", "dog")
    numbered = {f"LABEL_{i}": i for i in range(12)}
    assert indices(numbered, *map(str, range(12))) == {str(i): i for i in range(12)}
    with pytest.raises(CalibrationError, match="which is which cannot be told"):
        indices(numbered, *map(str, range(1, 13)))


def test_a_folder_of_links_is_read_again_when_it_changes(images: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "class").mkdir()
    (tmp_path / "linked" / "class").symlink_to(tmp_path / "class")
    source = FolderSource(path=tmp_path / "linked")
    before = listing_digest(source)
    (tmp_path / "class" / "a.png").write_bytes(next(images.rglob("*.png")).read_bytes())
    assert listing_digest(source) != before


def test_labels_are_the_models_or_those_of_sorted_folders(model: Path, images: Path, tmp_path: Path) -> None:
    config = open_source(model).config
    for file in list_folder(images, config, labelled=True):
        assert file.path.parent.name == f"LABEL_{file.label}"
    assert {file.label for file in list_folder(images, config, labelled=False)} == {-1}
    for letter in "jihgfedcba":  # as many as the model has classes, under other names
        (tmp_path / "named" / letter).mkdir(parents=True)
        shutil.copy(next((images / "LABEL_0").iterdir()), tmp_path / "named" / letter / "x.png")
    found = {file.path.parent.name: file.label for file in list_folder(tmp_path / "named", config, labelled=True)}
    assert found == {letter: index for index, letter in enumerate("abcdefghij")}


def test_images_are_drawn_once_each_and_read_as_the_processor_says(model: Path, images: Path) -> None:
    config, source = open_source(model).config, FolderSource(path=images)
    parts = [draw(source, model, config, skip=skip, count=4, seed=3, labelled=True).pixels for skip in (0, 4, 8)]
    whole = draw(source, model, config, skip=0, count=99, seed=3, labelled=True)
    assert torch.equal(torch.cat(parts), whole.pixels)
    assert len({tuple(x.flatten().tolist()) for x in whole.pixels}) == 12
    other = draw(source, model, config, skip=0, count=99, seed=4, labelled=True)
    assert not torch.equal(other.pixels, whole.pixels)
    file = list_folder(images, config, labelled=True)[0].path
    with Image.open(file) as image:
        values = torch.tensor(np.asarray(image), dtype=torch.float64).permute(2, 0, 1)
    expected = (values / 255 - 0.5) * 6
    torch.testing.assert_close(Preprocessor(model, config).read(file, name="x").double(), expected, atol=1e-5, rtol=0)
    with pytest.raises(CalibrationError, match="no more than 12"):
        draw(source, model, config, skip=12, count=1, seed=3, labelled=True)


def test_an_image_that_cannot_be_read_is_named(model: Path, tmp_path: Path) -> None:
    config = open_source(model).config
    folder = write_images(tmp_path / "images", 3, labelled=False)
    (folder / "0001.png").write_bytes((folder / "0001.png").read_bytes()[:60])
    with pytest.raises(CalibrationError, match=r"image .*0001\.png: cannot be read"):
        draw(FolderSource(path=folder), model, config, skip=0, count=3, seed=0, labelled=False)
    as_image(torch.zeros(3, 16, 20)).save(folder / "0001.png")
    with pytest.raises(CalibrationError, match=r"0001\.png: 20 x 16 becomes \[3, 16, 20\], and the model reads"):
        draw(FolderSource(path=folder), model, config, skip=0, count=3, seed=0, labelled=False)
    resizing = tmp_path / "resizing"
    shutil.copytree(model, resizing)
    write_processor(resizing, resize=True)
    found = draw(FolderSource(path=folder), resizing, config, skip=0, count=3, seed=0, labelled=False)
    assert found.pixels.shape == (3, 3, 16, 16)


@pytest.mark.parametrize("text", ["", "a/b/c", "x:y", "./none"])
def test_what_names_no_images(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_image_source(text)


def test_an_impossible_budget_is_refused_before_anything_is_computed(model: Path, images: Path, tmp_path: Path) -> None:
    """With quantized activations a row has one scale, without being told so: a part of a bit more than the codes."""
    config = CompressConfig.model_validate(
        {
            "run": {
                "model": str(model),
                "images": {"source": str(images), "num_images": 8, "activations": [4]},
                "candidates": {"bits": [3]},
            },
            "plan": {"budget_bits": 3.2},
            "output": tmp_path / "out",
            "store": str(tmp_path / "store"),
        }
    )
    assert config.run.candidates.group_sizes == (-1,)
    with pytest.raises(BudgetError, match="impossible"):
        ImageCompression(config, Silent()).check_plan()


def test_a_data_set_gives_the_images_and_labels_of_its_files(model: Path, images: Path) -> None:
    config = open_source(model).config
    files = draw(FolderSource(path=images), model, config, skip=0, count=12, seed=0, labelled=True)
    labels = {tuple(x.flatten().tolist()): int(y) for x, y in zip(files.pixels, files.labels, strict=True)}
    rows = draw(parse_image_source(f"hub:{images}"), model, config, skip=2, count=99, seed=0, labelled=True)
    assert len(rows.pixels) == 10
    assert rows.labelled
    for x, y in zip(rows.pixels, rows.labels, strict=True):
        assert labels[tuple(x.flatten().tolist())] == int(y)
    with pytest.raises(CalibrationError, match="cannot be read"):
        draw(parse_image_source(f"hub:{images}::none"), model, config, skip=0, count=1, seed=0, labelled=True)
