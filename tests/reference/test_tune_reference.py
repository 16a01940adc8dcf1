"""Tuning by streamed sweeps against plain autograd and one Adam on the whole model, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, write_tiny
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from lrpq.model.experts import loaded_weight
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.grid import Grid, QuantizedWeight
from lrpq.quant.rtn import round_to_nearest
from lrpq.tune.options import Trained, TuneOptions
from lrpq.tune.part import EPSILON, Gradients, Part
from lrpq.tune.sweep import TuneSweep

ALL = Trained.SCALES | Trained.VECTORS | Trained.CODES
CHOICE = Choice(bits=3, group_size=16)
WINDOWS = torch.randint(3, VOCABULARY - 8, (5, 12), generator=torch.Generator().manual_seed(5))
FAMILIES = ["llama", "llama-rope-scaled", "qwen2", "qwen3", "gemma2", "phi3", "opt", "opt-post-norm", "gpt-neox"]
EXPERTS = ["mixtral", "qwen3-moe"]


def stream_of(folder: Path, dtype: torch.dtype = torch.float64) -> BlockStream:
    return BlockStream(open_source(folder), dtype=dtype)


def quantized(stream: BlockStream, *, with_head: bool = False) -> dict[str, QuantizedWeight]:
    head = stream.head_spec
    specs = [*stream.specs, *([head] if with_head and head is not None else [])]
    return {spec.name: round_to_nearest(stream.weight(spec), CHOICE, grid=Grid.SIGNED) for spec in specs}


class Whole:
    """The same parameters and the same forward, written with autograd on transformers' own model."""

    def __init__(self, folder: Path, start: Mapping[str, QuantizedWeight], latent: Mapping[str, Tensor]) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")
        with torch.no_grad():
            self.original = self.model(WINDOWS, use_cache=False).logits.log_softmax(-1)
        self.start = start
        self.shift = {k: torch.zeros(w.scales.shape, requires_grad=True) for k, w in start.items()}
        self.latent = {k: latent[k].detach().clone().requires_grad_() for k in start}
        self.vectors = {k: p.detach() for k, p in self.model.named_parameters() if p.ndim == 1}
        self.vector_shift = {k: torch.zeros(len(p), requires_grad=True) for k, p in self.vectors.items()}

    def weight(self, name: str) -> Tensor:
        w = self.start[name]
        s = w.scales.double() * (1 + self.shift[name].double())
        s = s + (s.bfloat16().double() - s).detach()
        u = self.latent[name].double()
        codes = u + (u.round() - u).detach()
        return (codes.view(*s.shape, -1) * s.unsqueeze(-1)).view(codes.shape)

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        experts: dict[str, dict[int, Tensor]] = {}
        for name in self.start:
            parts = name.split(".")
            if len(parts) > 2 and parts[-2].isdigit() and parts[-3] == "experts":
                experts.setdefault(".".join([*parts[:-2], parts[-1]]), {})[int(parts[-2])] = self.weight(name)
            else:
                found[f"{name}.weight"] = self.weight(name)
        for name, by_index in experts.items():
            found[name] = torch.stack([by_index[e] for e in range(len(by_index))])
        for name, vector in self.vectors.items():
            unit = vector.square().mean().sqrt()
            found[name] = vector + (unit if unit > 0 else 1.0) * self.vector_shift[name].double()
        return found

    def loss(self, windows: list[int]) -> Tensor:
        logits = functional_call(self.model, self.tensors(), (WINDOWS[windows],), {"use_cache": False}).logits
        p, q = self.original[windows, :-1], logits.log_softmax(-1)[:, :-1]
        return (p.exp() * (p - q)).sum(-1).mean()

    def parameters(self) -> dict[str, dict[str, Tensor]]:
        return {"shift": self.shift, "latent": self.latent, "vector": self.vector_shift}


def options(**changes: Any) -> TuneOptions:
    return TuneOptions(**{"trained": ALL, "batch": 3, "micro_batch": 2, **changes})


def parameters_of(sweep: TuneSweep) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {"shift": {}, "latent": {}, "vector": {}}
    for part in sweep._parts:
        for linear in part.linears.values():
            assert linear.shift is not None
            assert linear.latent is not None
            found["shift"][linear.name], found["latent"][linear.name] = linear.shift, linear.latent
        found["vector"] |= {vector.name: vector.shift for vector in part.vectors.values()}
    return found


def gradients_of(sweep: TuneSweep, batch: list[int], monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """Gradients of the trained tensors, without the update."""

    def keep(part: Part, gradients: Gradients, factor: float) -> None:
        for key, state in (*part.linears.items(), *part.vectors.items()):
            state.set_gradients(gradients.sums[key])

    with monkeypatch.context() as patched:
        patched.setattr(Part, "update", keep)
        sweep.step(batch, 1.0)
    return {kind: {k: p.grad for k, p in some.items()} for kind, some in parameters_of(sweep).items()}  # type: ignore[misc]


def distance(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", [*FAMILIES, *EXPERTS])
def test_gradients_are_those_of_the_whole_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny(tmp_path / "model", name)
    stream = stream_of(folder)
    start = quantized(stream, with_head=True)
    batch = [4, 0, 3]
    with KeptInputs(memory_bytes=1 << 30) as kept:
        sweep = TuneSweep(stream, WINDOWS, start, options(), kept=kept)
        sweep.prepare()
        whole = Whole(folder, start, parameters_of(sweep)["latent"])
        loss = whole.loss(batch)
        loss.backward()
        found = gradients_of(sweep, batch, monkeypatch)
        assert sum(sweep.divergence(batch)) / 3 == pytest.approx(loss.item(), rel=1e-9)
    wanted = {kind: {k: p.grad for k, p in some.items()} for kind, some in whole.parameters().items()}
    largest = max(float(g.norm()) for some in wanted.values() for g in some.values() if g is not None)
    for kind, references in wanted.items():
        assert set(found[kind]) == set(references)
        for key, reference in references.items():
            assert reference is not None
            if kind == "vector" and key.endswith("k_proj.bias") and name.startswith("opt"):
                # attention ignores what all keys share
                assert float(found[kind][key].norm()) < 1e-12 * largest
                continue
            assert float(reference.norm()) > 1e-9 * largest, key
            assert distance(found[kind][key], reference) < 1e-6, (kind, key)


@pytest.mark.parametrize("resident", [False, True], ids=["streamed", "resident"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_steps_are_those_of_one_adam_on_the_whole_model(name: str, resident: bool, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", name)
    stream = stream_of(folder)
    start = quantized(stream)
    how = options(scale_rate=3e-3, vector_rate=2e-3, code_rate=0.1)
    rates = {"shift": how.scale_rate, "latent": how.code_rate, "vector": how.vector_rate}
    with KeptInputs(memory_bytes=1 << 30) as kept:
        sweep = TuneSweep(stream, WINDOWS, start, how, kept=kept, resident=resident)
        sweep.prepare()
        whole = Whole(folder, start, parameters_of(sweep)["latent"])
        adam = torch.optim.Adam(
            [{"params": list(some.values()), "lr": rates[kind]} for kind, some in whole.parameters().items()],
            betas=how.betas,
            eps=EPSILON,
        )
        for batch, factor in (([0, 1, 2], 1.0), ([3, 4], 0.5), ([2, 0, 4], 0.25)):
            for group, rate in zip(adam.param_groups, rates.values(), strict=True):
                group["lr"] = rate * factor
            adam.zero_grad()
            loss = whole.loss(batch)
            loss.backward()
            adam.step()
            with torch.no_grad():
                for latent in whole.latent.values():
                    latent.clamp_(-4, 3)
            nats = sweep.step(batch, factor)
            assert sum(nats) / len(batch) == pytest.approx(loss.item(), rel=1e-5)
        found = parameters_of(sweep)
        weights, _ = sweep.export()
    assert any(not torch.equal(weights[key].codes, w.codes) for key, w in start.items())
    for kind, wanted in whole.parameters().items():
        for key, value in wanted.items():
            assert distance(found[kind][key], value) < 1e-4, (kind, key)


def test_loaded_weight_is_the_one_that_experts_have(tmp_path: Path) -> None:
    """The reference stacks experts in the order in which transformers holds them."""
    folder = write_tiny(tmp_path / "model", "mixtral")
    stream = stream_of(folder)
    start = quantized(stream)
    whole = Whole(folder, start, {name: w.codes.float() for name, w in start.items()})
    for spec in stream.specs:
        if spec.routed:
            assert distance(whole.weight(spec.name), loaded_weight(whole.model, spec.name)) < 0.3
