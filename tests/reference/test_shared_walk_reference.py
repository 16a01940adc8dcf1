"""One walk back for grids and weights: what it carries over is what the folded model's own walk finds, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_images import images, write_classifier
from torch import Tensor

from lrpq.activations.calibrate import Calibration, calibrate
from lrpq.activations.clipping import channel_candidates
from lrpq.activations.folding import fold_plan, folding_of
from lrpq.compare.prepared import asked_of
from lrpq.compare.recipes import DEFAULT
from lrpq.compare.shared_walk import FoldedBench, SharedWalk
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.errors import QuantizationError
from lrpq.importance.asked import asked_by
from lrpq.importance.gather import BlockEvidence
from lrpq.importance.registry import MEASURES
from lrpq.model.kept import KeptInputs
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.hessian import HessianSum, accumulate, empty_hessian, mirror, normalized
from lrpq.relevance.composite import Relevance
from lrpq.relevance.rules import Pass
from lrpq.relevance.sweep import ProfileSweep, Shard, merge_block_sums
from lrpq.shards import root
from lrpq.transform.folded import FoldedSource

TERMS = Terms(dtype=torch.float64, micro_batch=3, shards=2)
ASKED = replace(
    asked_of([DEFAULT], [4.0]),
    weightings=frozenset({"none", "fisher", "cp-lrp", "blend"}),
    hessians_by=frozenset({"none", "fisher", "blend"}),
    passes=frozenset({Pass.LRP, Pass.CP_LRP}),
)
CASES = ("vit", "vit-wide-patches", "deit", "dinov2", "swin-padded")
"""With biases of queries and keys and without, with two special tokens, with padded windows and merged patches."""


class Walked:
    """A model whose norms have outlier channels off zero, walked once before it is folded and once after."""

    def __init__(self, folder: Path, name: str) -> None:
        self.source = open_source(write_classifier(folder, name))
        self.images = images(5, name).double()
        self.walk = SharedWalk(Workbench(self.source, self.images, TERMS), ASKED)
        self.stream = BlockStream(self.source, dtype=torch.float64)
        found: Calibration = calibrate(self.stream, self.images, widths=[4], token_weights=self.walk.squares)
        self.foldings = found.foldings(found.uniform(4))
        folded = FoldedSource(self.source, fold_plan(self.stream, self.foldings), dtype=torch.float64)
        self.bench = FoldedBench(folded, self.images, TERMS, walk=self.walk, foldings=self.foldings)
        blocks = range(self.stream.num_blocks - 1, -1, -1)
        own = Workbench(folded, self.images, TERMS).evidence(ASKED, for_activations=True)
        self.own: Mapping[int, BlockEvidence] = dict(zip(blocks, own, strict=True))
        self.carried: Mapping[int, BlockEvidence] = dict(zip(blocks, self.bench.evidence(ASKED), strict=True))


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> object:
    @cache
    def made(name: str) -> Walked:
        return Walked(tmp_path_factory.mktemp(name) / "model", name)

    return made


def close(found: Tensor, expected: Tensor, rtol: float) -> None:
    """Against the largest entry: sums of both signs are as exact as their terms."""
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_weights_at_outputs_are_those_of_the_folded_model(walked: object, name: str) -> None:
    """To float64's rounding; what is stored as float32 is rounded once."""
    w: Walked = walked(name)  # type: ignore[operator]
    assert {site for _, site in w.foldings} == ({"qkv", "up", "merge"} if name.startswith("swin") else {"qkv", "up"})
    for block, own in w.own.items():
        ours = w.carried[block]
        for weighting, sites in own.weights.items():
            for site, s in sites.items():
                close(ours.weights[weighting][site], s, 2**-23)
        for site, s in own.squares.items():
            close(ours.squares[site], s, 2**-23)
        for module, sums in own.modules.items():
            for running, squares in sums.squares.items():
                close(ours.modules[module].squares[running], squares, 1e-12)
            close(ours.modules[module].relevance, sums.relevance, 1e-12)
        for module, chunks in own.outputs.items():
            for G, expected in zip(ours.outputs[module], chunks, strict=True):
                close(G, expected, 1e-6)
        assert ours.cosine == pytest.approx(own.cosine, rel=1e-12) if own.cosine is not None else ours.cosine is None


@pytest.mark.parametrize("name", CASES)
def test_sums_over_inputs_are_carried_over(walked: object, name: str) -> None:
    """Hessians to the rounding of float32, in which they are summed; traces to that of float64."""
    w: Walked = walked(name)  # type: ignore[operator]
    for block, own in w.own.items():
        ours = w.carried[block]
        for weighting, sites in own.hessians.items():
            for site, expected in sites.items():
                found = ours.hessians[weighting][site]
                assert (found.weight_sum, found.num_tokens) == (
                    pytest.approx(expected.weight_sum, rel=1e-6),
                    expected.num_tokens,
                )
                close(normalized(found), normalized(expected), 3e-6)
                close(found.x, expected.x, 1e-6)
                before = w.walk.evidence[block].hessians[weighting][site]
                moved = float(
                    (normalized(before) - normalized(expected)).abs().max() / normalized(expected).abs().max()
                )
                assert (moved > 0.1) == ((block, site) in w.foldings)  # it is another matrix
        for module, sums in own.modules.items():
            close(ours.modules[module].trace, sums.trace, 1e-10)


def test_outlier_channels_keep_their_digits() -> None:
    """Channels whose centre is 30 times their spread, in float32: the sum over centred inputs is no difference of two
    rounded numbers that matters beside GPTQ's damping of a hundredth."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 24, generator=generator) * torch.logspace(-1, 1, 24)
    x[:, ::5] += 30 * x[:, ::5].std(0)
    s = torch.rand(4096, generator=generator)
    folding = folding_of(list(channel_candidates(x, 4))[-1])
    a, k = folding.affine
    sums = empty_hessian(24, with_first=True)
    for part in (slice(0, 1000), slice(1000, 4096)):
        sums = accumulate(sums, x[part], s[part])
    found = mirror(folding.of_hessian(sums)).xx.double()
    shifted = a * x.double() + k
    expected = shifted.T @ (s.double()[:, None] * shifted)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.diagonal().mean())


def test_a_sum_that_was_not_gathered_is_asked_for(walked: object) -> None:
    w: Walked = walked("vit")  # type: ignore[operator]
    folding = w.foldings[0, "qkv"]
    with pytest.raises(QuantizationError, match="need the sum of the inputs"):
        folding.of_hessian(accumulate(empty_hessian(32), torch.ones(2, 32), torch.ones(2)))


def test_shards_of_one_worker_keep_the_sums_of_the_inputs(tmp_path: Path) -> None:
    """A worker merges the shards it has in place; the sum of the inputs is among what is merged."""
    stream = BlockStream(open_source(write_classifier(tmp_path / "model", "vit")), dtype=torch.float32)
    pixels = images(4, "vit").float()

    def profiled(num_shards: int) -> Mapping[str, HessianSum]:
        parts = pixels.split(len(pixels) // num_shards)
        shards = [Shard(index=i, first_window=i * len(part), tokens=part) for i, part in enumerate(parts)]
        with KeptInputs(memory_bytes=1 << 30) as kept:
            sweep = ProfileSweep(
                stream,
                shards,
                num_shards=num_shards,
                relevance=Relevance.FISHER,
                floor=0.0,
                power=0.0,
                seed=0,
                micro_batch=1,
                kept=kept,
                for_activations=True,
            )
            sweep.embed()
            for block, module in stream.stream(range(stream.num_blocks)):
                sweep.forward(block, module)
            sweep.seed_gradients()
            last = stream.num_blocks - 1
            with stream.block(last) as module:
                nodes, _ = sweep.backward(last, module)
        return root(nodes, num_shards, merge_block_sums).hessians

    whole, shared = profiled(1), profiled(4)
    for site, expected in whole.items():
        found = shared[site].x
        assert expected.x is not None
        assert found is not None, site
        assert torch.allclose(found, expected.x, rtol=1e-5, atol=1e-6 * float(expected.x.abs().max()))


def test_the_folded_bench_measures_without_a_walk(walked: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs of candidates, rankings, token weights: as of the folded model; only a weighting that looks at the inputs
    takes a walk of its own."""
    w: Walked = walked("vit")  # type: ignore[operator]
    measures = {name: MEASURES[name] for name in ("lrpq", "relevance-magnitude", "hessian-trace", "lim", "zd")}
    terms = replace(TERMS, bits=(3, 4), group_sizes=(-1,))
    bench = FoldedBench(w.bench.source, w.images, terms, walk=w.walk, foldings=w.foldings)
    own = Workbench(w.bench.source, w.images, terms).gather(
        measures, weightings=["blend"], candidates_by="blend", with_outputs=True
    )
    with monkeypatch.context() as patched:
        patched.delattr(Workbench, "walk_back")
        ours = bench.gather(measures, weightings=["blend"], candidates_by="blend", with_outputs=True)
        assert not asked_by(measures, ["inverse-norm"], candidates_by="blend", with_outputs=False).within(w.walk.asked)
        with pytest.raises(AttributeError, match="walk_back"):
            bench.gather(measures, weightings=["inverse-norm"], candidates_by="blend")
    for name in measures:
        for row, expected in zip(ours.costs.get(name, []), own.costs.get(name, []), strict=True):
            assert (row.module, row.choice) == (expected.module, expected.choice)
            assert row.cost_nats == pytest.approx(expected.cost_nats, rel=1e-3)
        for module, score in own.scores.get(name, {}).items():
            assert ours.scores[name][module] == pytest.approx(score, rel=1e-6)
