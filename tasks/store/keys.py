"""Artefact keys: a stage's result is found again if, and only if, nothing that makes it has changed.

A key covers the inputs, the parameters, the environment (libraries, processor) and the code of the stage: the
syntax trees of its modules and of all first-party modules they import (code.py), so a changed constant in the
core makes a new key and a changed comment or docstring does not.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

import lrpq
from lrpq.errors import StoreError
from tasks.store.code import FIRST_PARTY, code_digest
from tasks.store.documents import JSON, canonical_text, plain_json, sha256_text

__all__ = ["FIRST_PARTY", "artifact_key", "code_digest", "environment_fingerprint"]

_FORMAT = "lrpq artefact key 1"
_FLOAT = "$float"
# those that compute; the others only carry bytes. Triton and CUDA's compiler come with torch
_LIBRARIES = ("torch", "transformers", "numpy", "numba", "llvmlite", "highspy")
_LOOP_SETTINGS = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_DISABLE_JIT")
"""What makes numba compile for another processor than this one."""
_PROCESSOR_FIELDS = (
    "vendor_id",
    "model name",
    "CPU implementer",
    "CPU part",
)  # x86 has the first two, Arm the others


def artifact_key(
    stage: str,
    *,
    inputs: Mapping[str, str],
    parameters: Mapping[str, JSON],
    code: str,
    environment: Mapping[str, str],
) -> str:
    """SHA-256, hexadecimal, over canonical JSON of all arguments; the order of mappings does not matter.

    Floats enter as their exact hexadecimal text, so 1 and 1.0 make different keys, as do True and 1.

    Raises:
        StoreError: NaN, an infinity or what JSON cannot hold among the parameters, or a name starting with
            ``$``.
    """
    content = {
        "format": _FORMAT,
        "stage": stage,
        "inputs": inputs,
        "parameters": parameters,
        "code": code,
        "environment": environment,
    }
    return sha256_text(canonical_text(_exact(plain_json(content, where="key"))))


def environment_fingerprint(device: torch.device | str, *, threads: int) -> dict[str, str]:
    """What may change the bytes of a result without any change of code or parameters.

    ``threads`` is the number of intra-op threads the stage will run with: sums are split among them.

    Raises:
        StoreError: a CUDA device that is not there, or a kind of device whose model cannot be told.
    """
    device = torch.device(device)
    found = {
        "lrpq": lrpq.__version__,
        **{name: version(name) for name in _LIBRARIES},
        "threads": str(threads),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cpu":
        # The capability (AVX2, AVX512, ...) picks PyTorch's kernels and can be lowered by
        # ATEN_CPU_CAPABILITY.
        loops = " ".join(f"{name}={os.environ[name]}" for name in _LOOP_SETTINGS if os.environ.get(name))
        return {
            **found,
            "device": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
            "loops": loops or "for this processor",
        }
    if device.type == "cuda" and torch.cuda.is_available():
        runtime = torch.version.cuda or torch.version.hip
        return {
            **found,
            "device": torch.cuda.get_device_name(device),
            "device_runtime": f"{runtime}, cuDNN {torch.backends.cudnn.version()}",  # type: ignore[no-untyped-call]
        }
    raise StoreError(f"cannot tell the model of device {device}: expected cpu or an available cuda device")


def _exact(value: JSON) -> JSON:
    if isinstance(value, float):
        return {_FLOAT: value.hex()}
    if isinstance(value, Mapping):
        for name in value:
            if name.startswith("$"):
                raise StoreError(f"parameter {name!r}: names must not start with '$', which marks exact numbers")
        return {name: _exact(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    first: dict[str, str] = {}
    for line in lines:
        name, _, text = line.partition(":")
        first.setdefault(name.strip(), text.strip())
    named = [first[name] for name in _PROCESSOR_FIELDS if name in first]
    return " ".join(named) or f"{platform.machine()} {platform.processor()}"
