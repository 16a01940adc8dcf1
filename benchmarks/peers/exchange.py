"""What the benchmark and a peer hand each other, as files: a request, token ids, weights, a result.

A peer is a module that turns a request into a result with ``serve``. It runs in its own environment, where this file is
all that it shares with the project; hence nothing but torch and safetensors here.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

DENSE, PACKED, RESULT = "dense", "packed", "result.json"
WEIGHTS = "*.safetensors"
TOKENS = "tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One row that is wanted."""

    peer: str
    model: str
    tokens: str
    """File of the calibration windows."""
    output: str
    """Folder for all that is made."""
    bits: int
    """Code width; with one bfloat16 scale a group, all-in bits are ``bits + 16 / group_size``."""
    group_size: int
    device: str
    seed: int
    options: Mapping[str, str] = field(default_factory=dict)
    """What the peer's defaults are replaced with."""

    @property
    def packed(self) -> Path:
        """Where the peer's own packed checkpoint belongs."""
        return Path(self.output) / PACKED


@dataclass(slots=True)
class Spent:
    """Filled when the measured part ends."""

    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a peer made of the model; its packed checkpoint lies in the request's folder."""

    weights: Mapping[str, Tensor]
    """Module -> dequantized weight, [d_out, d_in]."""
    spent: Spent
    settings: Mapping[str, str]
    """What a reader of the table must know."""
    packages: tuple[str, ...]
    """Whose versions are told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the benchmark reads of a row that was made."""

    seconds: float
    """Of quantizing, without imports, loading and writing."""
    peak_bytes: int
    """Of the process until then: allocated on a GPU, resident otherwise."""
    settings: dict[str, str]
    versions: dict[str, str]
    modules: list[str]
    """Names of the quantized modules."""


def write_request(request: Request, path: Path) -> None:
    path.write_text(json.dumps(asdict(request), indent=2) + "\n", encoding="utf-8")


def read_request(path: Path) -> Request:
    return Request(**json.loads(path.read_text(encoding="utf-8")))


def read_result(folder: Path) -> Result:
    return Result(**json.loads((folder / RESULT).read_text(encoding="utf-8")))


def write_tokens(path: Path, tokens: Tensor) -> None:
    """Write windows of token ids, [windows, length]."""
    save_file({TOKENS: tokens.to(torch.int64).contiguous()}, path)


def read_tokens(path: Path) -> Tensor:
    """Windows of token ids as int64, [windows, length]."""
    tokens: Tensor = load_file(path)[TOKENS]
    return tokens


def write_dense(model: Path, output: Path, weights: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint with the weights of some modules replaced, in the dtypes of the original.

    Raises:
        ValueError: a module that the checkpoint has not, or a weight of another shape.
    """
    output.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and not path.match(WEIGHTS):
            shutil.copy2(path, output / path.name)
    left = {f"{name}.weight": weight for name, weight in weights.items()}
    for path in sorted(model.glob(WEIGHTS)):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        for name in tensors.keys() & left.keys():
            weight, original = left.pop(name), tensors[name]
            if weight.shape != original.shape:
                raise ValueError(f"{name}: {tuple(weight.shape)} replaces {tuple(original.shape)}")
            tensors[name] = weight.detach().to("cpu", original.dtype).contiguous()
        save_file(tensors, output / path.name, metadata={"format": "pt"})
    if left:
        raise ValueError(f"{next(iter(left))}: no such weight in {model}")


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


@contextmanager
def measured(device: str) -> Iterator[Spent]:
    """Time a part; the peak is that of the whole process so far (Linux), or of the GPU's allocations."""
    spent = Spent()
    on_gpu = device.startswith("cuda")
    started = time.monotonic()
    yield spent
    if on_gpu:
        torch.cuda.synchronize()
    spent.seconds = time.monotonic() - started
    spent.peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else _resident_peak()


def _resident_peak() -> int:
    # not getrusage: its maximum survives exec, so that it starts from what the parent held
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError("/proc/self/status has no VmHWM")
    return int(found[1]) * 1024


def serve(make: Callable[[Request, Tensor], Made]) -> None:
    """Read the request that the command line names, make its row, and write the dense checkpoint and the result."""
    request = read_request(Path(sys.argv[1]))
    torch.manual_seed(request.seed)
    made = make(request, read_tokens(Path(request.tokens)))
    output = Path(request.output)
    write_dense(Path(request.model), output / DENSE, made.weights)
    result = Result(
        seconds=made.spent.seconds,
        peak_bytes=made.spent.peak_bytes,
        settings=dict(made.settings),
        versions={name: metadata.version(name) for name in made.packages},
        modules=sorted(made.weights),
    )
    (output / RESULT).write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
