"""An environment for every peer: its packages at pinned versions, torch from the interpreter that runs the benchmark.

With a network: a virtual environment of that interpreter. torch and what only torch brings (CUDA's libraries, Triton)
are linked into a folder that a .pth file names, so that pip finds them installed and fetches no other; everything else
of the interpreter stays out of sight. Without (``wheels``): the packages that an interpreter with torch and
transformers lacks, installed from a folder into another folder, which PYTHONPATH puts before the interpreter's own.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from benchmarks.peers.exchange import last_line

REQUIREMENTS = Path(__file__).parent / "requirements"
BESIDE_TORCH = ("triton", "pytorch-triton")
BESIDE_TORCH_PREFIXES = ("nvidia-", "cuda-")
STAMP = "made-for"


class EnvironmentNotMade(Exception):
    """Why a peer's environment could not be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """How a peer is started."""

    python: Path
    path: tuple[str, ...] = ()
    """Before its own packages: PYTHONPATH."""


def own_interpreter() -> Interpreter:
    """The one that runs the benchmark, with what it sees."""
    path = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return Interpreter(python=Path(sys.executable), path=tuple(str(Path(part).absolute()) for part in path))


def environment(name: str, root: Path, *, wheels: Path | None = None) -> Interpreter:
    """Make the environment ``name`` below ``root``, or take it if it was made for the same requirements.

    Raises:
        EnvironmentNotMade: venv or pip failed, or there are no wheels for it.
    """
    folder = root / name
    requirements = REQUIREMENTS / (f"{name}.txt" if wheels is None else f"{name}.wheels.txt")
    if not requirements.exists():
        raise EnvironmentNotMade(f"{name} needs packages that are published as source alone; not from wheels")
    stamp = _stamp(requirements, wheels)
    made = folder / STAMP
    fresh = not made.exists() or made.read_text(encoding="utf-8") != stamp
    if wheels is not None:
        if fresh:
            _run(
                *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels)),
                *("--no-deps", "--no-compile", "--upgrade", "--target", str(folder), "-r", str(requirements)),
            )
            made.write_text(stamp, encoding="utf-8")
        return Interpreter(python=Path(sys.executable), path=(str(folder.absolute()),))
    python = folder / "bin" / "python"
    if fresh:
        _run(sys.executable, "-m", "venv", "--clear", str(folder))
        _link_torch(folder / "outer-torch")
        (site,) = (folder / "lib").glob("python*/site-packages")
        (site / "outer_torch.pth").write_text(f"{(folder / 'outer-torch').absolute()}\n", encoding="utf-8")
        torch = metadata.version("torch").partition("+")[0]
        _run(
            *(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *(f"torch=={torch}", "-r", str(requirements)),
        )
        made.write_text(stamp, encoding="utf-8")
    return Interpreter(python=python.absolute())


def _stamp(requirements: Path, wheels: Path | None) -> str:
    lines = requirements.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = ["".join(line for line in lines if not line.startswith("#")), sys.version, metadata.version("torch")]
    if wheels is not None:
        parts += sorted(path.name for path in wheels.glob("*.whl"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _link_torch(folder: Path) -> None:
    """Links to the top-level files and folders of torch and what only it brings."""
    folder.mkdir()
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name == "torch" or name in BESIDE_TORCH or name.startswith(BESIDE_TORCH_PREFIXES):
            for top in sorted({file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}):
                link = folder / top
                if not link.is_symlink():
                    link.symlink_to(Path(str(distribution.locate_file(top))).absolute())


def _run(*command: str) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # pip sees its own alone
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=variables)
    if done.returncode:
        raise EnvironmentNotMade(last_line(done.stderr))
