"""Mixture of experts: sums of every expert against plain autograd through transformers' own loop over the experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, write_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrpq.model.experts import LinearExperts
from lrpq.model.kept import KeptInputs
from lrpq.model.layers import Choice
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.factor import factorize
from lrpq.quant.gptq import gptq
from lrpq.quant.hessian import accumulate, empty_hessian, merge, normalized
from lrpq.quant.starved import MIN_TOKEN_SHARE, Evidence, hessian_of_expert, is_starved
from lrpq.refine.products import SiteProducts, merge_products
from lrpq.refine.routed import POOLED, dense_weights, routed_products
from lrpq.refine.sweep import RefineSweep
from lrpq.relevance.composite import Relevance
from lrpq.relevance.sweep import ProfileSweep, Shard, SiteWeights, merge_block_sums
from lrpq.shards import root
from tasks.refine import shard_weights
from tasks.streams import StreamJob

WINDOWS, LENGTH, SHARDS, FLOOR = 4, 20, 2, 0.03
TOKENS = torch.randint(3, VOCABULARY - 8, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(2))
BLOCK = 1  # both blocks of the Mixtral have experts, the second of the Qwen3-MoE


@pytest.fixture(scope="module", params=["mixtral", "qwen3-moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("experts") / request.param, request.param)


@dataclass
class Watched:
    """What every expert is run on, by (expert, projection), and leaves of the graph that are added to its outputs."""

    x: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    rows: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    zeros: dict[tuple[int, str], Tensor] = field(default_factory=dict)


def watch(experts: Any) -> Watched:
    """Run the experts' 3-D parameters one token at a time, with a zero to differentiate by added to every output."""
    watched = Watched()

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for e in range(experts.num_experts):
            rows = [t for t in range(len(hidden)) if e in index[t].tolist()]
            if not rows:
                continue
            x = hidden[rows]
            up_zero = torch.zeros(len(rows), experts.gate_up_proj.shape[1], requires_grad=True)
            both = x @ experts.gate_up_proj[e].T + up_zero
            half = both.shape[1] // 2
            inner = experts.act_fn(both[:, :half]) * both[:, half:]
            down_zero = torch.zeros(len(rows), hidden.shape[1], requires_grad=True)
            y = inner @ experts.down_proj[e].T + down_zero
            for n, t in enumerate(rows):
                scale = weights[t, index[t].tolist().index(e)]
                output = output.index_add(0, torch.tensor([t]), (y[n] * scale)[None])
            for kind, values, zero in (("gate_up", x, up_zero), ("down", inner, down_zero)):
                watched.x[e, kind] = values.detach()
                watched.rows[e, kind] = torch.tensor(rows)
                watched.zeros[e, kind] = zero
        return output

    experts.forward = forward
    return watched


def profile(folder: Path, relevance: Relevance, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[int, SiteWeights]]:
    """Sums and weights of one block; the labels are the tokens themselves, so that the reference has them too."""
    stream = BlockStream(open_source(folder), dtype=torch.float32)
    size = WINDOWS // SHARDS
    sweep = ProfileSweep(
        stream,
        [Shard(index=i, first_window=i * size, tokens=TOKENS[i * size : (i + 1) * size]) for i in range(SHARDS)],
        num_shards=SHARDS,
        relevance=relevance,
        floor=FLOOR,
        power=1.0,
        seed=0,
        micro_batch=1,
        kept=KeptInputs(memory_bytes=1 << 30),
    )
    sweep.embed()
    for index, block in stream.stream(range(2)):
        sweep.forward(index, block)
    drawn = iter(TOKENS)
    monkeypatch.setattr("lrpq.relevance.head.sample_labels", lambda *_: next(drawn))
    sweep.seed_gradients()
    for _index, block in stream.stream([BLOCK]):
        parts, weights = sweep.backward(BLOCK, block)
    return root(parts, SHARDS, merge_block_sums), weights


def reference(folder: Path) -> Watched:
    """One backward pass through the whole model of all windows at once."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.requires_grad_(False)
    watched = watch(model.model.layers[BLOCK].mlp.experts)
    logits = model(TOKENS, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten(), reduction="sum")
    loss.backward()
    return watched


def test_fisher_sums_of_every_expert(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hessians of the routed tokens, their weights, the curvature and the trace are those of plain autograd."""
    sums, weights = profile(folder, Relevance.FISHER, monkeypatch)
    watched = reference(folder)
    assert len(watched.x) >= 6
    for (e, kind), x in watched.x.items():
        site = f"experts.{e}.{kind}"
        g2 = watched.zeros[e, kind].grad.double().square()
        where = torch.cat([weights[i].rows[site] + i * WINDOWS // SHARDS * LENGTH for i in range(SHARDS)])
        found = torch.cat([weights[i].values[site] for i in range(SHARDS)])
        order = where.argsort()
        assert torch.equal(where[order], watched.rows[e, kind])
        # the floor is a share of the mean over the expert's tokens of a micro-batch: of a window
        mean = g2.mean(1)
        window = watched.rows[e, kind] // LENGTH
        floor = torch.stack([mean[window == w].mean() for w in window.tolist()])
        s = mean + FLOOR * floor
        torch.testing.assert_close(found[order].double(), s, rtol=2e-3, atol=0)
        hessian = sums.hessians[site]
        assert hessian.num_tokens == len(x)
        H = (x.double() * s[:, None]).T @ x.double() / s.sum()
        torch.testing.assert_close(normalized(hessian).double(), H, rtol=2e-3, atol=float(H.abs().max()) * 1e-4)
        name = f"model.layers.{BLOCK}.mlp.experts.{e}.{'gate_up_proj' if kind == 'gate_up' else 'down_proj'}"
        torch.testing.assert_close(sums.curvature[name], g2.sum(0), rtol=2e-3, atol=float(g2.sum(0).max()) * 1e-5)
        assert float(sums.traces[name].sum()) == pytest.approx(float(g2.sum(1) @ x.double().square().sum(1)), rel=2e-3)
    assert sums.num_tokens == TOKENS.numel()


def test_relevance_reaches_the_experts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the LRP pass are not those of the gradient."""
    fisher, blend = (profile(folder, r, monkeypatch)[1] for r in (Relevance.FISHER, Relevance.LRP))
    assert any(
        not torch.allclose(fisher[0].values[site] / fisher[0].values[site].sum(), values / values.sum(), rtol=0.05)
        for site, values in blend[0].values.items()
        if site.startswith("experts.") and len(values) > 1
    )


def refine_sweep(folder: Path, *, with_shift: bool = True) -> RefineSweep:
    size = WINDOWS // SHARDS
    sweep = RefineSweep(
        BlockStream(open_source(folder), dtype=torch.float32),
        {i: TOKENS[i * size : (i + 1) * size] for i in range(SHARDS)},
        num_shards=SHARDS,
        micro_batch=1,
        with_shift=with_shift,
    )
    sweep.embed()
    return sweep


def changed(W: Tensor, seed: int) -> Tensor:
    return W + 0.05 * W.abs().mean() * torch.randn(W.shape, generator=torch.Generator().manual_seed(seed))


def test_products_behind_a_quantized_prefix(folder: Path) -> None:
    """Every expert's C over the tokens that the changed model sends there; D over those that both models send."""
    sweep = refine_sweep(folder)
    stream = sweep.stream
    own: dict[str, Any] = {}
    for which in ("original", "quantized"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        own[which] = model
    for n, spec in enumerate(s for s in stream.specs if not s.routed):
        weight = own["quantized"].get_submodule(spec.name).weight
        weight.data = changed(weight.data, n)
    done = {s.name: own["quantized"].get_submodule(s.name).weight.data for s in stream.specs if not s.routed}
    watched = {which: watch(model.model.layers[BLOCK].mlp.experts) for which, model in own.items()}
    for model in own.values():
        model(TOKENS, use_cache=False)
    some = {s.input_site: torch.rand(WINDOWS * LENGTH) + 0.1 for s in stream.block_specs(BLOCK) if s.routed}
    half = WINDOWS // SHARDS * LENGTH
    weights = {site: {0: s[:half], 1: s[half:]} for site, s in some.items()}
    for index, block in stream.stream(range(2)):
        before = {name: W for name, W in done.items() if name.startswith(f"model.layers.{index}.")}
        if index < BLOCK:
            sweep.advance(index, block, before)
            continue
        steps = [step for step in stream.steps(index) if step[0].routed]
        assert [len(step) for step in steps] == [4, 4]
        for step in steps:
            kind = step[0].input_site.rsplit(".", 1)[-1]
            pooled = kind == "gate_up"
            found = routed_products(sweep, index, block, step, weights, before, pooled=pooled)
            everything = torch.zeros(step[0].d_in, step[0].d_in, dtype=torch.float64)
            for e in range(4):
                site = f"experts.{e}.{kind}"
                products = root(found[site], SHARDS, merge_products)
                if (e, kind) not in watched["quantized"].x:
                    assert products.hessian.num_tokens == 0
                    continue
                xq, rows = watched["quantized"].x[e, kind].double(), watched["quantized"].rows[e, kind]
                s = some[site][rows].double()
                C = (xq * s[:, None]).T @ xq
                everything += C
                close(normalized(products.hessian) * products.hessian.weight_sum, C)
                assert products.hessian.num_tokens == len(rows)
                x, place = watched["original"].x[e, kind].double(), watched["original"].rows[e, kind].tolist()
                D = torch.zeros_like(C)
                for n, t in enumerate(rows.tolist()):
                    if t in place:
                        D += s[n] * torch.outer(x[place.index(t)] - xq[n], xq[n])
                assert D.norm() > 1e-3 * C.norm()
                close(products.shift, D)
            if pooled:
                hessian = root(found[POOLED], SHARDS, merge_products).hessian
                close(normalized(hessian) * hessian.weight_sum, everything)
                assert hessian.weight_sum == pytest.approx(sum_of_weights(some, watched["quantized"]), rel=1e-5)


def sum_of_weights(some: dict[str, Tensor], watched: Watched) -> float:
    return sum(
        float(some[f"experts.{e}.gate_up"][r].sum()) for (e, kind), r in watched.rows.items() if kind == "gate_up"
    )


def close(found: Tensor | None, wanted: Tensor) -> None:
    assert found is not None
    assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-4


def test_a_token_that_only_the_quantized_prefix_sends_weighs_as_the_mean() -> None:
    s = dense_weights(torch.tensor([2.0, 4.0]), torch.tensor([3, 1]), 5)
    assert s.tolist() == [3.0, 4.0, 3.0, 2.0, 3.0]
    assert dense_weights(torch.empty(0), torch.empty(0, dtype=torch.long), 2).tolist() == [1.0, 1.0]
    assert dense_weights(torch.empty(0), torch.empty(0, dtype=torch.long), 2, default=0.25).tolist() == [0.25, 0.25]


def test_an_expert_that_the_original_never_reaches_weighs_as_the_others_of_its_block() -> None:
    """Weights have a unit, mean g^2: ones beside 1e-7 would make the pooled sum that expert's alone."""
    stored = {
        "qkv": torch.ones(6),
        "experts.0.gate_up": torch.tensor([1e-7, 3e-7]),
        "experts.0.gate_up.rows": torch.tensor([1, 4], dtype=torch.int32),
        "experts.1.gate_up": torch.empty(0),
        "experts.1.gate_up.rows": torch.empty(0, dtype=torch.int32),
    }
    job = StreamJob(
        model="",
        dtype="float32",
        store="",
        windows="",
        length=3,
        num_tokens=6,
        num_shards=2,
        micro_batch=1,
    )
    found = shard_weights(stored, [0, 1], job)
    assert [s.tolist() for s in found["experts.1.gate_up"].values()] == [[pytest.approx(2e-7)] * 3] * 2
    assert torch.cat(list(found["experts.0.gate_up"].values())).tolist() == pytest.approx(
        [2e-7, 1e-7, 2e-7, 2e-7, 3e-7, 2e-7]
    )


def test_experts_without_tokens_are_rounded_and_those_with_few_share(folder: Path) -> None:
    """Two gates, and what stands in for a starved expert's Hessian."""
    width = 32
    assert is_starved(0, d_in=1, total_tokens=10)
    assert is_starved(width - 1, d_in=width, total_tokens=10)
    assert not is_starved(width, d_in=width, total_tokens=10)
    total = 100_000
    assert is_starved(int(MIN_TOKEN_SHARE * total) - 1, d_in=width, total_tokens=total)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, width, generator=g)
    own = accumulate(empty_hessian(width), x[:5], torch.ones(5))
    pooled = merge(own, accumulate(empty_hessian(width), x[5:], torch.ones(45)))
    assert hessian_of_expert(pooled, None, total_tokens=50) == (pooled, Evidence.OWN)
    assert hessian_of_expert(own, pooled, total_tokens=50) == (pooled, Evidence.POOLED)
    for starved in (own, empty_hessian(width)):
        white, evidence = hessian_of_expert(starved, None, total_tokens=50)
        assert evidence is Evidence.NONE
        W = torch.randn(8, width, generator=g)
        choice = Choice(bits=3, group_size=32)
        codes = gptq(W, factorize(normalized(white)), [choice])[0]
        scaled = W / codes.scales.float()
        assert torch.equal(codes.codes, scaled.round().clamp(-4, 3).to(torch.int8))


def test_only_the_experts_that_are_hit_are_run() -> None:
    experts = LinearExperts(3, 8, 4, nn.SiLU())
    index, weights = torch.tensor([[0, 2], [2, 0]]), torch.full((2, 2), 0.5)
    experts(torch.randn(2, 8), index, weights)
    rows = [experts.get_submodule(f"{e}.down_proj").rows for e in range(3)]
    assert rows[1] is None
    assert sorted(rows[0].tolist()) == sorted(rows[2].tolist()) == [0, 1]
    experts(torch.randn(2, 8), torch.ones(2, 1, dtype=torch.long), torch.ones(2, 1))
    assert experts.get_submodule("0.down_proj").rows is None


def test_products_of_one_worker_or_two_are_the_same_bytes(folder: Path) -> None:
    one = refine_sweep(folder, with_shift=False)
    two = [refine_sweep(folder, with_shift=False) for _ in range(SHARDS)]
    for i, sweep in enumerate(two):
        del sweep.quantized[1 - i]
    results: list[dict[str, SiteProducts]] = []
    for sweeps in ([one], two):
        merged: dict[str, dict[Any, SiteProducts]] = {}
        for sweep in sweeps:
            for index, block in sweep.stream.stream(range(2)):
                if index < BLOCK:
                    sweep.advance(index, block, {})
                    continue
                for step in (s for s in sweep.stream.steps(index) if s[0].routed):
                    for site, nodes in routed_products(sweep, index, block, step, None, {}, pooled=False).items():
                        merged.setdefault(site, {}).update(nodes)
        results.append({site: root(nodes, SHARDS, merge_products) for site, nodes in merged.items()})
    assert results[0].keys() == results[1].keys()
    for site, products in results[0].items():
        assert torch.equal(products.hessian.xx, results[1][site].hessian.xx)
