"""The CUDA C++ of trellis codes, run by threads of the CPU, against numba's loops: no GPU, but a C++ compiler."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_on_threads
import pytest
import torch
from torch import Tensor
from trellis_case import hessian, numbers

import lrpq.kernels
from lrpq.kernels.trellis import EDGE_ROWS, round_segments
from lrpq.model.layers import Choice
from lrpq.quant import wavefront
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import Rows, gptq
from lrpq.quant.trellis import WIDTHS, codebook, segment_edges
from lrpq.quant.wavefront import Blocks

pytestmark = pytest.mark.skipif(cuda_on_threads.COMPILER is None, reason="no g++")
FUNCTIONS = (("round_segments", 15), ("round_blocks", 19))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def kernels(folder: Path) -> Iterator[Any]:
    """`lrpq.kernels.trellis_cuda` with threads in place of NVRTC and the driver."""

    def compiled(source: str, name: str, defines: tuple[tuple[str, str], ...], device: int | None) -> Any:
        return cuda_on_threads.library(source, FUNCTIONS, defines, folder), name

    def launch(function: tuple[Any, str], blocks: int, threads: int, arguments: Sequence[Tensor | int]) -> None:
        cuda_on_threads.launched(*function, blocks, arguments)

    stand_in = ModuleType("lrpq.kernels.nvrtc")
    vars(stand_in).update(compiled=compiled, launch=launch)
    name = "lrpq.kernels.trellis_cuda"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lrpq.kernels.nvrtc", stand_in)
        patch.delitem(sys.modules, name, raising=False)
        patch.delattr(lrpq.kernels, "trellis_cuda", raising=False)
        yield importlib.import_module(name)
        # nobody else is to find it: what was there before comes back
        del sys.modules[name], lrpq.kernels.trellis_cuda


@pytest.mark.parametrize(
    ("bits", "firsts", "most"), [(2, [0, 0], 18), (3, [1, 0], 18), (5, [-2, 3], 3), (6, [0, 18], 2)]
)
def test_segments_are_those_of_the_loops(kernels: Any, bits: int, firsts: list[int], most: int) -> None:
    """Columns of their own, more than a leaf of them, errors fed back, nothing else written."""
    columns, rows = 18, 144
    W, R = numbers(columns, rows, seed=1), 0.2 * numbers(columns, columns, seed=2)
    S, weights = numbers(1, rows, seed=3).abs() + 0.5, numbers(rows, seed=4).abs() + 0.1
    runs, begins = torch.zeros(columns, dtype=torch.int64), torch.tensor(firsts, dtype=torch.int32)
    found = []
    for loops in (True, False):
        T, codes = W.clone(), torch.full((columns, rows), 99, dtype=torch.int8)
        given = T, W, S, R, weights, runs, codebook(bits), codes, segment_edges([rows])
        if loops:
            round_segments(*given, bits=bits, firsts=begins, most_columns=most)
        else:
            kernels.round_segments(*given, begins, most_columns=most, bits=bits, edge_rows=EDGE_ROWS)
        found.append((codes, T))
    (expected, errors), (codes, others) = found
    assert torch.equal(codes == 99, expected == 99)
    assert torch.equal(others[codes == 99], errors[codes == 99])
    assert (codes == expected).double().mean() > 0.98
    assert float(others.square().mean()) == pytest.approx(float(errors.square().mean()), rel=0.01)


@pytest.mark.parametrize("bits", WIDTHS)
def test_blocks_in_one_launch_are_those_of_the_loops(kernels: Any, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of which one moves nothing, a last segment of 16 rows, and two columns beyond a leaf; at 3 bits a block
    that is moved and moves another."""
    d_in, sizes = 18, [[128, 128, 16] if bits == 3 else [128, 16], [16]]
    rows = sum(map(sum, sizes))
    choice = Choice(bits=bits, group_size=6, trellis=True)
    W, factor, weights = (
        0.1 * numbers(rows, d_in, seed=1),
        factorize(hessian(d_in, seed=2)),
        numbers(rows, seed=3).abs(),
    )
    weights += 0.1
    (plain,) = gptq(W, factor, [choice], rows=Rows(parts=[rows], weights=weights))
    own = torch.arange(len(sizes[0])).repeat_interleave(torch.tensor(sizes[0]))
    pull = torch.where(own[:, None] > own[None, :], numbers(len(own), len(own), seed=4) / len(own) ** 0.5, 0.0)
    chunks = [Blocks(sizes=sizes[0], pull=pull), Blocks(sizes=sizes[1], pull=None)]
    targets = W.T.contiguous()[factor.order], factor, plain.scales.T.float(), choice
    expected = wavefront.round_stream_blocks(*targets, weights=weights, chunks=chunks)
    assert (expected.targets != targets[0]).any()

    def round_blocks(*arguments: Any, bits: int) -> None:
        kernels.round_blocks(*arguments, bits=bits, edge_rows=EDGE_ROWS)

    monkeypatch.setattr(wavefront, "round_blocks", round_blocks)
    wanted, S = targets[0].clone(), targets[2].contiguous()
    found = wavefront._streams_at_once(wanted, torch.ones(()), factor, S, choice, weights, chunks)
    assert (found.codes == expected.codes).double().mean() > (0.98 if bits < 5 else 0.9)
    lost = [float((x.targets - targets[0]).square().sum()) for x in (found, expected)]
    assert lost[0] == pytest.approx(lost[1], rel=0.02)
