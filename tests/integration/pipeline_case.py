"""What the tests of the main job share: one Prefect server and one Ray pool a session, tiny models with a tokenizer.

The pool is a real one of two workers. Every stage of a run goes through it as it would through its own; only the five
seconds of starting Ray are paid once. Tests of the command line start their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, write_tokenizer
from transformers import AutoModelForCausalLM

from flows.config import CompressConfig
from lrpq.checkpoint.stored import StoredCheckpoint
from tasks.cluster import Pool
from tasks.opening import open_pool

WORKERS = 2
_POOL = pytest.StashKey[Pool]()
_SERVER = pytest.StashKey[str]()


def write_model(
    folder: Path, *, bos: bool = False, layers: int = 2, hidden: int = 128, ffn: int = 192, **options: Any
) -> Path:
    """Write a tiny Llama with its own byte-level BPE; ``options`` as for write_llama."""
    options = {"dtype": torch.bfloat16, "vocabulary": VOCABULARY, **options}
    write_llama(folder, layers=layers, hidden=hidden, ffn=ffn, **options)
    write_tokenizer(folder, bos=bos)
    # Logits of a few units: with the probability of every token in play, losses and divergences mean something.
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        tensors = load_file(path)
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            if name in tensors and (name == "lm_head.weight" or options.get("tied")):
                tensors[name] *= 0.03
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def start_server(request: pytest.FixtureRequest) -> str:
    """URL of the session's Prefect server; PREFECT_API_URL names it, here and in subprocesses."""
    from flows.prefect_server import prefect_api, quiet_prefect

    config = request.config
    if _SERVER not in config.stash:
        cache_folder = Path(request.getfixturevalue("tmp_path_factory").mktemp("prefect"))
        stack = ExitStack()
        config.add_cleanup(stack.close)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("XDG_CACHE_HOME", str(cache_folder / "cache"))
        patch.setenv("PREFECT_HOME", str(cache_folder / "home"))
        patch.delenv("PREFECT_API_URL", raising=False)
        quiet_prefect()
        config.stash[_SERVER] = stack.enter_context(prefect_api())
    return config.stash[_SERVER]


def start_pool(request: pytest.FixtureRequest) -> Pool:
    """The session's two workers."""
    config = request.config
    if _POOL not in config.stash:
        stack = ExitStack()
        config.add_cleanup(stack.close)
        config.stash[_POOL] = stack.enter_context(open_pool(device="cpu", workers=WORKERS, threads=1))
    return config.stash[_POOL]


class Silent:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.reused: list[str] = []
        self.notes: list[str] = []
        self.told: list[str] = []
        self.left: dict[str, int] = {}
        self.on_advance: Callable[[str, str], None] = lambda name, detail: None

    def stage(self, name: str, total: int, unit: str = "block") -> None:
        self.stages.append(name)
        self.left[name] = total

    def advance(self, name: str, detail: str = "") -> None:
        self.left[name] -= 1
        self.on_advance(name, detail)

    def done(self, name: str, *, seconds: float, reused: bool) -> None:
        if reused:
            self.reused.append(name)
        else:
            assert self.left[name] == 0, f"{name} was announced with {self.left[name]} units too many"

    def note(self, text: str) -> None:
        self.notes.append(text)

    def tell(self, text: str) -> None:
        self.told.append(text)


class Job:
    """Compressions on the session's pool, all in one store."""

    def __init__(self, pool: Pool, folder: Path, *, scales: str = "auto") -> None:
        self.pool = pool
        self.folder = folder
        self.scales = scales
        self.progress = Silent()

    def config(self, model: Path, output: str, **changes: Any) -> CompressConfig:
        """A small configuration; ``changes`` are ``section__field`` names."""
        document: dict[str, Any] = {
            "run": {
                "model": str(model),
                "calibration": {"source": "pydoc:calibrate", "num_windows": 6, "length": 48},
                "candidates": {"bits": [2, 3, 4, 5, 6, 8], "group_sizes": [64], "scales": self.scales},
                "shards": 4,
                "micro_batch": 2,
            },
            "plan": {"budget_bits": 3.5},
            "evaluation": {"num_windows": 4, "length": 48},
            "cluster": {"workers": WORKERS, "device": "cpu"},
            "output": self.folder / output,
            "store": str(self.folder / "store"),
        }
        for path, value in changes.items():
            *sections, name = path.split("__")
            below = document
            for section in sections:
                below = below[section]
            below[name] = value
        if {"plan__budget_bytes", "plan__max_kl"} & set(changes) and "plan__budget_bits" not in changes:
            del document["plan"]["budget_bits"]
        return CompressConfig.model_validate(document)

    @contextmanager
    def sharing(self) -> Iterator[Silent]:
        """Inside, runs take the session's pool; yields what they are to report to."""
        import flows.compression

        @contextmanager
        def shared(**_: object) -> Iterator[Pool]:
            yield self.pool

        self.progress = Silent()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flows.compression, "open_pool", shared)
            yield self.progress

    def run(self, config: CompressConfig) -> dict[str, Any]:
        """Run the flow; ``self.progress`` then holds what it reported."""
        from flows.compress import run_compress

        with self.sharing() as progress:
            return run_compress(config, progress)

    def __call__(self, model: Path, output: str, **changes: Any) -> dict[str, Any]:
        return self.run(self.config(model, output, **changes))


def stored_bits(folder: Path) -> tuple[int, int]:
    """Bits of packed codes and scales in the files, and the weights they stand for."""
    bits = weights = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.endswith((".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx")):
                    tensor = file.get_tensor(name)
                    bits += 8 * tensor.numel() * tensor.element_size()
                elif name.endswith(".weight_shape"):
                    rows, columns = file.get_tensor(name).tolist()
                    weights += rows * columns
    return bits, weights


@torch.no_grad()
def with_codes(original: Path, stored: StoredCheckpoint, modules: Sequence[Mapping[str, Any]]) -> Any:
    """The original in bfloat16 with the dequantized weights of a checkpoint, by transformers."""
    dense: Any = AutoModelForCausalLM.from_pretrained(original)
    for module in modules:
        weight = stored.codes(module["name"])
        assert weight is not None
        dense.get_submodule(module["name"]).weight.copy_(weight.dequantize(torch.bfloat16))
    return dense


def file_bytes(folder: Path) -> int:
    """Bytes of all weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def contents(folder: Path, names: Sequence[str] = ("*.safetensors", "config.json")) -> dict[str, bytes]:
    """Files of a checkpoint whose bytes are promised."""
    return {path.name: path.read_bytes() for name in names for path in sorted(folder.glob(name))}


def snapshot(folder: Path) -> dict[str, float]:
    """Every object of a store with its time of writing, but for the marks that every start leaves."""
    return {
        str(path.relative_to(folder)): os.stat(path).st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "starts"
    }
