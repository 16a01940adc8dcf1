"""A profile with gradients on some of the windows against autograd through the whole model, and against plain sums."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from tiny_models import write_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow
from lrpq.compare import allocation
from lrpq.compare.fast import Stitched, fast_codes
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.model.kept import KeptInputs
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.hessian import normalized
from lrpq.relevance.composite import Relevance
from lrpq.relevance.head import sequence_generator
from lrpq.relevance.partial import PartialSweep
from lrpq.relevance.sweep import BlockSums, ProfileSweep, Shard, merge_block_sums
from lrpq.shards import Node, assign, root, split

WINDOWS, LENGTH, VOCABULARY, LAYERS = 7, 12, 128, 2
NUM_SHARDS, MICRO_BATCH, SEED, EVERY = 3, 2, 5, 4
EXPLAINED = (0, 4)
"""Shards hold windows 0-1, 2-3 and 4-6; of 0 to 6, four divides 0 and 4: the second shard has no gradients at all."""
TOKENS = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(tmp_path_factory.mktemp("partial") / "llama", layers=LAYERS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.mul_(0.02)  # logits of a few units
    model.save_pretrained(folder)
    return folder


def shards_of(indices: range) -> list[Shard]:
    spans = split(WINDOWS, NUM_SHARDS)
    return [Shard(index=i, first_window=spans[i].start, tokens=TOKENS[spans[i].start : spans[i].stop]) for i in indices]


def partial(folder: Path, *, num_workers: int = 1) -> tuple[list[BlockSums], list[BlockSums], BlockSums, float]:
    """Per block what is summed on the way forward and on the way back; the head's sums; summed loss."""
    forward: list[dict[Node, BlockSums]] = [{} for _ in range(LAYERS)]
    backward: list[dict[Node, BlockSums]] = [{} for _ in range(LAYERS)]
    head: dict[Node, BlockSums] = {}
    total = 0.0
    for mine in assign(NUM_SHARDS, num_workers):
        sweep = PartialSweep(
            BlockStream(ModelSource(folder), dtype=torch.float32),
            shards_of(mine),
            num_shards=NUM_SHARDS,
            seed=SEED,
            micro_batch=MICRO_BATCH,
            kept=KeptInputs(memory_bytes=1 << 30),
            with_head=True,
            gradients_every=EVERY,
        )
        sweep.embed()
        for block, module in sweep.stream.stream(range(LAYERS)):
            forward[block] |= sweep.forward_summing(block, module)
        nats, tokens = sweep.seed_gradients()
        assert tokens == sum(sweep.num_explained(shard) for shard in sweep.shards)
        total += nats
        assert not sweep.hidden
        head |= sweep.head_sums
        for block, module in sweep.stream.stream(range(LAYERS - 1, -1, -1)):
            backward[block] |= sweep.backward(block, module)[0]
        assert sweep.kept.held_bytes == 0  # inputs of the other windows were never kept
    merged = [[root(parts, NUM_SHARDS, merge_block_sums) for parts in found] for found in (forward, backward)]
    return merged[0], merged[1], root(head, NUM_SHARDS, merge_block_sums), total


def reference(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Inputs and output gradients of every linear layer of a whole model in float64, labels sampled as the sweep's."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(_: Any, arguments: Any, output: Tensor, name: str = name) -> None:
                inputs[name], outputs[name] = arguments[0].detach(), output

            module.register_forward_hook(hook)
    logits = model(TOKENS, use_cache=False).logits
    p = logits.detach().softmax(-1)
    uniform = torch.stack(
        [torch.rand(LENGTH, dtype=torch.float64, generator=sequence_generator(SEED, i)) for i in range(WINDOWS)]
    )
    labels = (p.cumsum(-1) <= uniform[..., None]).sum(-1)
    nats = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(WINDOWS, LENGTH)
    gradients = torch.autograd.grad(nats.sum(), list(outputs.values()))
    return inputs, dict(zip(outputs, gradients, strict=True)), float(nats.detach()[list(EXPLAINED)].sum())


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def test_hessians_are_of_all_tokens_and_curvature_of_those_with_gradients(folder: Path) -> None:
    forward, backward, head, nats = partial(folder)
    inputs, gradients, expected_nats = reference(folder)
    assert nats == pytest.approx(expected_nats, rel=1e-4)
    stream = BlockStream(ModelSource(folder), dtype=torch.float32)
    for block in range(LAYERS):
        assert (forward[block].num_tokens, forward[block].num_explained) == (WINDOWS * LENGTH, 0)
        assert (backward[block].num_tokens, backward[block].num_explained) == (WINDOWS * LENGTH, 2 * LENGTH)
        assert not backward[block].hessians
        assert not backward[block].outputs
        for site, specs in stream.sites(block).items():
            x = inputs[specs[0].name].flatten(0, 1)
            found = forward[block].hessians[site]
            assert found.num_tokens == found.weight_sum == WINDOWS * LENGTH
            assert distance(normalized(found), x.T @ x / len(x)) < 1e-5
            for spec in specs:
                g = gradients[spec.name][list(EXPLAINED)].flatten(0, 1)
                c = backward[block].curvature[spec.name] / backward[block].num_explained
                assert distance(c, g.square().mean(0)) < 1e-4
                every = gradients[spec.name].flatten(0, 1).square().mean(0)
                assert distance(c, every) > 1e-2  # those of all windows are others
    (hessian,), (curvature,) = head.hessians.values(), head.curvature.values()
    x, g = inputs["lm_head"].flatten(0, 1), gradients["lm_head"][list(EXPLAINED)].flatten(0, 1)
    assert distance(normalized(hessian), x.T @ x / len(x)) < 1e-5
    assert distance(curvature / head.num_explained, g.square().mean(0)) < 1e-4


def test_bytes_do_not_depend_on_how_shards_are_shared_out(folder: Path) -> None:
    one = partial(folder)
    for num_workers in (2, 4):  # the second of two has a shard without gradients
        other = partial(folder, num_workers=num_workers)
        for block in range(LAYERS):
            for site, sums in one[0][block].hessians.items():
                assert torch.equal(sums.xx, other[0][block].hessians[site].xx)
            for name, c in one[1][block].curvature.items():
                assert torch.equal(c, other[1][block].curvature[name])


@pytest.mark.parametrize("name", ["mixtral", "qwen2"])
def test_inputs_are_those_of_a_profile_without_weights(name: str, tmp_path: Path) -> None:
    """Experts too, each over the tokens that are sent there."""
    folder = write_tiny(tmp_path / name, name)
    found: list[BlockSums] = []
    for every in (1, EVERY):
        common: dict[str, Any] = {"num_shards": NUM_SHARDS, "seed": SEED, "micro_batch": MICRO_BATCH}
        stream = BlockStream(open_source(folder), dtype=torch.float32)
        common["kept"] = KeptInputs(memory_bytes=1 << 30)
        sweep: ProfileSweep
        if every == 1:
            sweep = ProfileSweep(
                stream, shards_of(range(NUM_SHARDS)), relevance=Relevance.NONE, floor=0.0, power=1.0, **common
            )
        else:
            sweep = PartialSweep(stream, shards_of(range(NUM_SHARDS)), gradients_every=every, **common)
        sweep.embed()
        for block, module in stream.stream(range(2)):
            if isinstance(sweep, PartialSweep):
                parts = sweep.forward_summing(block, module)
            else:
                sweep.forward(block, module)
        if every == 1:
            sweep.seed_gradients()
            for block, module in stream.stream([1]):
                parts, _ = sweep.backward(block, module)
        found.append(root(parts, NUM_SHARDS, merge_block_sums))
    full, part = found
    assert full.hessians.keys() == part.hessians.keys()
    for site, sums in full.hessians.items():
        assert sums.num_tokens == part.hessians[site].num_tokens
        if sums.num_tokens:
            assert distance(normalized(part.hessians[site]), normalized(sums).double()) < 1e-4
    shares = {sums.num_tokens for sums in part.hessians.values()}
    assert (name == "mixtral") == (len(shares) > 1)


def test_costs_of_the_fast_method_are_its_formula(folder: Path) -> None:
    """1/2 sum_j f c_j dW_j H dW_j^T in float64, f by the trace, of the codes that its plans take, at both widths."""
    terms = Terms(bits=(2, 3), group_sizes=(32,), dtype=torch.float32, shards=NUM_SHARDS, micro_batch=2, seed=SEED)
    bench = Workbench(ModelSource(folder), TOKENS, terms)
    inputs, gradients, _ = reference(folder)
    stream = bench.stream()
    seen: list[CostRow] = []
    for budget in (2.5, 3.5):

        def plan(rows: Sequence[CostRow], budget: float = budget) -> Plan:
            seen[:] = rows
            return allocation.by_costs(rows, budget_bits=budget)

        made = fast_codes(bench, plan, gradients_every=EVERY, cost_rows=10**6)
        assert {row.module.name for row in seen} == {spec.name for spec in stream.specs} == set(made.codes)
        _check_costs(seen, made, stream, inputs, gradients)


def _check_costs(
    rows: Sequence[CostRow],
    made: Stitched,
    stream: BlockStream,
    inputs: dict[str, Tensor],
    gradients: dict[str, Tensor],
) -> None:
    for row in rows:
        if made.plan.choices[row.module.name] != row.choice:
            continue
        x = inputs[row.module.name].flatten(0, 1)
        g2 = gradients[row.module.name][list(EXPLAINED)].flatten(0, 1).square()
        trace = (g2.sum(1) * inputs[row.module.name][list(EXPLAINED)].flatten(0, 1).square().sum(1)).mean()
        c = g2.mean(0) * trace / (g2.mean(0).sum() * x.square().sum(1).mean())
        q = made.codes[row.module.name]
        assert q.choice == row.choice
        dW = stream.weight(row.module).double() - q.dequantize(torch.float64)
        wanted = 0.5 * float(((x @ dW.T).square().mean(0) * c).sum())
        assert row.cost_nats == pytest.approx(wanted, rel=1e-3)
