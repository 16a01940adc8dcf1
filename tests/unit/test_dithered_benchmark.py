"""The benchmark that takes an earlier quantization's lattice out of a model: it is there before and not after."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from conftest import write_llama
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.dithered import WIDTHS, dithered, errors, write_dithered
from lrpq.errors import ConfigError
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream

RUN = 32


def on_a_lattice(W: Tensor) -> Tensor:
    """Codes from -16 to 15 times a scale of either sign for each run of columns, which the largest weight of the run
    meets with -16: the format of GGUF called Q5_0."""
    runs = W.view(W.shape[0], -1, RUN)
    largest = runs.gather(-1, runs.abs().argmax(-1, keepdim=True))
    step = (largest / -16).half().to(W)
    return ((runs / step).round().clamp(-16, 15) * step).view_as(W)


@pytest.fixture
def lattice(tmp_path: Path) -> Path:
    folder = write_llama(tmp_path / "lattice", hidden=128, ffn=256)
    file = folder / "model.safetensors"
    torch.manual_seed(1234)  # not the noise's own numbers
    tensors = {
        name: on_a_lattice(torch.randn_like(tensor)) if name.endswith("proj.weight") else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def falls(folder: Path) -> list[float]:
    stream = BlockStream(open_source(folder), dtype=torch.float32)
    found = list(errors(stream.weight, list(stream.specs)))
    return [wide / narrow for wide, narrow in itertools.pairwise(found)]


def test_what_a_lattice_saves_at_five_bits_is_gone_behind_the_noise(lattice: Path, tmp_path: Path) -> None:
    assert WIDTHS[1:3] == (4, 5)
    assert falls(lattice)[1] > 5.5
    write_dithered(open_source(lattice), lattice, tmp_path / "out", share=0.08, width=RUN, seed=0)
    after = falls(tmp_path / "out")
    assert all(3.5 < fall < 4.3 for fall in after)


def test_only_quantized_layers_change_and_by_their_share(lattice: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        write_dithered(open_source(lattice), lattice, tmp_path / out, share=0.08, width=RUN, seed=3)
    before, after, again = (load_file(tmp_path / name / "model.safetensors") for name in ("lattice", "one", "two"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], again[name], rtol=0, atol=0)
        if name.endswith("proj.weight"):
            change = (after[name] - tensor).double()
            assert float(change.norm() / tensor.double().norm()) == pytest.approx(0.08, rel=0.05)
            by_run = change.view(-1, RUN).norm(dim=1) / tensor.double().view(-1, RUN).norm(dim=1)
            assert float(by_run.square().mean().sqrt()) == pytest.approx(0.08, rel=0.05)
        else:
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)


def test_what_cannot_be_written_is_refused(lattice: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        write_dithered(open_source(lattice), lattice, lattice, share=0.08, width=RUN, seed=0)
    with pytest.raises(ConfigError, match="runs of 48 columns"):
        dithered(torch.ones(2, 64), share=0.1, width=48, generator=torch.Generator())
