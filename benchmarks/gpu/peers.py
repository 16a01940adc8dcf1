"""The GPTQ functions of llm-compressor and GPTQModel on the same matrices, where these packages are installed.

Only the modules with the functions themselves are imported: what their packages' own ``__init__`` files import (data
sets, model loaders, other quantizers) is not needed and not expected. The functions run as they are, with the defaults
of their packages but for bits and group size. Versions they were written against: llm-compressor 0.14.0.1, whose
`quantize_weight` takes stacked weights; GPTQModel 7.6.0, whose `GPTQ.quantize` takes a layer and a Hessian.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import matrices
from benchmarks.gpu.measure import measured, now, release
from benchmarks.gpu.quantizer import GRID, ONE_WIDTH
from benchmarks.gpu.reference import total_loss
from benchmarks.gpu.report import Figure, Report, Row
from lrpq.model.layers import Choice
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.grid import Grid, QuantizedWeight

PART = "peers"
SEARCHED, GIVEN = "lrpq", "lrpq, symmetric scales given"
RUNS = 4
"""The first compiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One matrix; a peer gets copies, which it may overwrite."""

    W: Tensor
    H: Tensor
    scales: Tensor
    """lrpq's own for a symmetric grid, which a peer may be given."""
    group_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a peer made."""

    Q: Tensor
    seconds: float
    notes: Mapping[str, Figure]


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What lrpq made of a matrix."""

    seconds: float
    loss: float


Peer = Callable[[Case], Made]


def measure_peers(
    report: Report, device: torch.device, shapes: list[tuple[int, int]], *, group_size: int, required: bool
) -> None:
    """Print lrpq and every peer on every matrix; a peer that is missing is a failure only if ``required``."""
    for name, package in (("llm-compressor", "llmcompressor"), ("GPTQModel", "gptqmodel")):
        if importlib.util.find_spec(package) is None:
            if required:
                report.add(Row(part=PART, name=name, error="not installed"))
            else:
                report.say(f"{PART}: {name} is not installed")
    H: Tensor | None = None
    for number, (d_out, d_in) in enumerate(shapes):
        if H is None or len(H) != d_in:
            H = None
            release(device)
            H = matrices.hessian(d_in, seed=1, device=device)
        W = matrices.weights(d_out, d_in, seed=100 + number, device=device)
        label = f"{d_out}x{d_in}, {ONE_WIDTH} bits"
        own, case = _own(report, W, H, group_size, label, device)
        for name, (package, baseline, peer) in PEERS.items():
            if importlib.util.find_spec(package) is not None:
                full = f"{label}: {name}"
                report.attempt(PART, full, partial(_add, report, case, full, peer, own[baseline]))
                release(device)
        del W, case
        release(device)


def _own(
    report: Report, W: Tensor, H: Tensor, group_size: int, label: str, device: torch.device
) -> tuple[dict[str, Own], Case]:
    choice = Choice(bits=ONE_WIDTH, group_size=group_size)
    given = [gptq(W, factorize(H), [choice], grid=Grid.SYMMETRIC)[0].scales]
    ways: dict[str, Callable[[], QuantizedWeight]] = {
        SEARCHED: lambda: gptq(W, factorize(H), [choice], grid=GRID)[0],
        GIVEN: lambda: gptq(W, factorize(H), [choice], scales=given, grid=Grid.SYMMETRIC)[0],
    }
    own = {}
    for name, way in ways.items():
        found = measured(way, device, repeats=RUNS)
        own[name] = Own(seconds=found.seconds, loss=total_loss(W, found.value.dequantize(torch.float32), H))
        report.add(
            Row(
                part=PART,
                name=f"{label}: {name}",
                seconds=found.seconds,
                peak_bytes=found.peak_bytes,
                figures={"undamped loss": own[name].loss},
            )
        )
    return own, Case(W=W, H=H, scales=given[0].float(), group_size=group_size)


def _add(report: Report, case: Case, name: str, peer: Peer, own: Own) -> None:
    peer(case)  # warms up, as lrpq does
    made = min((peer(case) for _ in range(RUNS)), key=lambda run: run.seconds)
    loss = total_loss(case.W, made.Q, case.H)
    figures: dict[str, Figure] = {
        "undamped loss": loss,
        "times lrpq's loss": loss / own.loss,
        "times lrpq's seconds": made.seconds / own.seconds,
    }
    report.add(Row(part=PART, name=name, seconds=made.seconds, figures=figures | dict(made.notes)))


def _without_init(name: str) -> ModuleType:
    """A package whose modules can be imported, its ``__init__`` left out."""
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        package = ModuleType(name)
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or ())
        sys.modules[name] = package
    return sys.modules[name]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown: carried as a folder"


def _llm_compressor(case: Case, scales: Tensor | None = None) -> Made:
    """Static activation order, its default; scales by its default observer's rule (absmax), unless given."""
    for name in ("llmcompressor", "llmcompressor.modifiers", "llmcompressor.modifiers.gptq"):
        _without_init(name)
    module: Any = importlib.import_module("llmcompressor.modifiers.gptq.gptq_quantize")
    quantization: Any = importlib.import_module("compressed_tensors.quantization")
    utils: Any = importlib.import_module("compressed_tensors.quantization.utils")
    arguments = quantization.QuantizationArgs(
        num_bits=ONE_WIDTH, type="int", symmetric=True, strategy="group", group_size=case.group_size, actorder="static"
    )
    d_out, d_in = case.W.shape
    groups = case.W.view(d_out, d_in // case.group_size, case.group_size)
    absmax, zeros = utils.calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    scale = absmax if scales is None else scales
    inputs = case.W.clone().unsqueeze(0), case.H.clone().unsqueeze(0)
    started = now(case.W.device)
    with torch.no_grad():
        found = module.quantize_weight(
            *inputs,
            scale=scale.float().unsqueeze(0),
            zero_point=zeros.unsqueeze(0),
            global_scale=None,
            quant_args=arguments,
        )
    seconds = now(case.W.device) - started
    probe = torch.empty(1, 1, 128, device=case.W.device)
    notes: dict[str, Figure] = {
        "Triton": str(bool(module.triton_req(probe)) and module.get_triton_gptq_config(arguments) is not None),
        "fell back to nearest": str(bool(found[2].any())),
        "version": _version("llmcompressor"),
    }
    return Made(Q=found[0][0], seconds=seconds, notes=notes)


def _llm_compressor_given(case: Case) -> Made:
    return _llm_compressor(case, case.scales)


def _gptqmodel(case: Case, **options: object) -> Made:
    """Its defaults: groups ordered by activation, scales found as the sweep reaches a group."""
    _without_init("gptqmodel").__dict__.setdefault("DEBUG_ON", False)  # which the package's __init__ reads from DEBUG
    for name in ("gptqmodel.looper", "gptqmodel.models"):
        _without_init(name)
    module: Any = importlib.import_module("gptqmodel.quantization.gptq")
    config: Any = importlib.import_module("gptqmodel.quantization.config")
    quantize_config = config.QuantizeConfig(bits=ONE_WIDTH, group_size=case.group_size, sym=True, **options)
    layer = nn.Linear(case.W.shape[1], case.W.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(case.W.clone(), requires_grad=False)
    task = module.GPTQ(layer, quantize_config)
    task.quantizer.configure(perchannel=True)
    task.H, task.nsamples = case.H.clone(), matrices.TOKENS_A_CHANNEL * len(case.H)
    started = now(case.W.device)
    with torch.no_grad():
        found = task.quantize()
    seconds = now(case.W.device) - started
    notes: dict[str, Figure] = {"damping": float(found[6]), "version": _version("gptqmodel")}
    if case.W.device.type == "cuda":
        block: Any = importlib.import_module("gptqmodel.quantization.gptq_cuda")
        notes["JIT kernel"] = str(bool(block.block_update_available()))
    return Made(Q=found[0].float(), seconds=seconds, notes=notes)


def _gptqmodel_ordered(case: Case) -> Made:
    return _gptqmodel(case, desc_act=True, act_group_aware=False)


PEERS: Mapping[str, tuple[str, str, Peer]] = {
    "llm-compressor": ("llmcompressor", SEARCHED, _llm_compressor),
    "llm-compressor, the same scales": ("llmcompressor", GIVEN, _llm_compressor_given),
    "GPTQModel": ("gptqmodel", SEARCHED, _gptqmodel),
    "GPTQModel, activation order": ("gptqmodel", SEARCHED, _gptqmodel_ordered),
}
"""Name -> package, which of lrpq's own it is set against, and function."""
