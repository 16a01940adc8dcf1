"""CUDA C++ of trellis codes, compiled: where NVIDIA's run-time compiler is installed, with a GPU or without."""

from __future__ import annotations

import pytest

from lrpq.kernels.trellis import EDGE_ROWS
from lrpq.kernels.trellis_source import SOURCE
from lrpq.quant.trellis import WIDTHS

pytest.importorskip("cuda.bindings", reason="no CUDA bindings")


def compiled(bits: int, architecture: str) -> bytes:
    from lrpq.kernels.nvrtc import cubin
    from lrpq.kernels.trellis_cuda import macros

    return cubin(SOURCE, macros(bits, EDGE_ROWS), architecture)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_compiles(bits: int) -> None:
    code = compiled(bits, "sm_90")
    assert b"round_segments" in code
    assert b"round_blocks" in code


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_89", "sm_100", "sm_120"])
def test_every_architecture_compiles(architecture: str) -> None:
    """The widest use of shared memory, 46 KB, which all of them have."""
    assert compiled(2, architecture)


def test_what_does_not_compile_is_said_with_the_compilers_words() -> None:
    from lrpq.kernels.nvrtc import CudaError, cubin

    with pytest.raises(CudaError, match=r"(?s)does not compile with --gpu-architecture=sm_90.*DNAME=7.*error: "):
        cubin("no such thing;", [("NAME", "7")], "sm_90")
