"""CUDA C++ compiled where it runs, by NVIDIA's compiler and driver through `cuda.bindings`, which PyTorch's builds for
CUDA require. For what Triton does not give: a multiprocessor's memory, read at a place that is found while running."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrpq.errors import ConfigError

try:
    from cuda.bindings import driver, nvrtc
except ImportError as error:
    raise ConfigError(
        "trellis codes on a GPU: no module cuda.bindings, which PyTorch's builds for CUDA bring along; "
        "install PyTorch with pip for CUDA, or cuda-bindings and nvidia-cuda-nvrtc of its CUDA's version"
    ) from error


class CudaError(RuntimeError):
    """The compiler or the driver refused, which is a mistake of the source or of the installation; says what and why,
    in the compiler's words."""


@lru_cache(maxsize=256)
def compiled(source: str, name: str, defines: tuple[tuple[str, str], ...], device: int) -> Any:
    """A function of the source, for one device; other functions of the same source and macros compile nothing again.

    Args:
        source: CUDA C++ without includes; the function is ``extern "C"``.
        name: of the function.
        defines: macros and their values.
        device: index of the GPU.

    Raises:
        CudaError: the source does not compile (with the compiler's log), or the driver does not load it.
    """
    with torch.cuda.device(device):
        return _done(driver.cuModuleGetFunction(_module(source, defines, device), name.encode()), name)


@lru_cache(maxsize=64)
def _module(source: str, defines: tuple[tuple[str, str], ...], device: int) -> Any:
    """The source, loaded into the context that PyTorch has on the current device, which is this one."""
    torch.cuda.current_stream()  # makes the context where nothing has made it yet
    major, minor = torch.cuda.get_device_capability(device)
    binary = np.frombuffer(cubin(source, defines, f"sm_{major}{minor}"), dtype=np.uint8)
    return _done(driver.cuModuleLoadData(binary.ctypes.data), "module")


def cubin(source: str, defines: Sequence[tuple[str, str]], architecture: str) -> bytes:
    """Machine code of the source; needs no GPU.

    Args:
        source: as for ``compiled``, as are the macros.
        defines: macros and their values.
        architecture: such as ``sm_90``.

    Raises:
        CudaError: it does not compile.
    """
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{key}={value}" for key, value in defines)]
    program = _done(nvrtc.nvrtcCreateProgram(source.encode(), b"source.cu", 0, [], []), "source")
    status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status[0]):
        log = b" " * max(2, _done(nvrtc.nvrtcGetProgramLogSize(program), "log"))  # one byte is CPython's, shared
        _done(nvrtc.nvrtcGetProgramLog(program, log), "log")
        _done(nvrtc.nvrtcDestroyProgram(program), "source")
        raise CudaError(f"does not compile with {' '.join(options)}:\n{log.decode(errors='replace')}")
    binary: bytes = b" " * _done(nvrtc.nvrtcGetCUBINSize(program), "size of the binary")
    _done(nvrtc.nvrtcGetCUBIN(program, binary), "binary")
    _done(nvrtc.nvrtcDestroyProgram(program), "source")
    return binary


def launch(function: Any, blocks: int, threads: int, arguments: Sequence[Tensor | int]) -> None:
    """Put a launch into the current stream of the current device.

    Args:
        function: from ``compiled``.
        blocks: of the grid.
        threads: of a block.
        arguments: pointers, and whole numbers, ``long long`` all of them.

    Raises:
        CudaError: the driver refused it.
    """
    values = tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    kinds = tuple(ctypes.c_longlong if isinstance(x, int) else ctypes.c_void_p for x in arguments)
    stream = torch.cuda.current_stream().cuda_stream
    _done(driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, (values, kinds), 0), "launch")


def _done(found: tuple[Any, ...], what: str) -> Any:
    """What a call gives beside its status."""
    status, *rest = found
    if int(status):
        raise CudaError(f"{what}: {status!r}")
    return rest[0] if rest else None
