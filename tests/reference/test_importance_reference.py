"""The measures of importance against one ordinary backward pass through the whole model, written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Gathered, Workbench
from lrpq.importance.evidence import ModuleEvidence
from lrpq.importance.measured import filled, noise_factors, one_at_a_time
from lrpq.importance.probe import measure_kl
from lrpq.importance.registry import MEASURES, Measure
from lrpq.importance.weightings import WEIGHTINGS
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.streaming import BlockStream

WINDOWS, LENGTH, VOCABULARY, LAYERS = 5, 12, 128, 3
TOKENS = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))
TERMS = Terms(bits=(2, 3, 4), group_sizes=(32,), dtype=torch.float32, shards=2, micro_batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("importance") / "llama", layers=LAYERS, tied=False)


@pytest.fixture(scope="module")
def bench(folder: Path) -> Workbench:
    return Workbench(ModelSource(folder), TOKENS, TERMS)


@pytest.fixture(scope="module")
def seen() -> dict[str, ModuleEvidence]:
    return {}


@pytest.fixture(scope="module")
def gathered(bench: Workbench, seen: dict[str, ModuleEvidence]) -> Gathered:
    """All measures and weightings in one walk; the evidence itself is kept by a measure that returns nothing new."""

    def keep(evidence: ModuleEvidence) -> float:
        seen[evidence.spec.name] = evidence
        return 0.0

    return bench.gather(
        {**MEASURES, "keep": Measure(source="test", score=keep)},
        weightings=tuple(WEIGHTINGS),
        candidates_by="blend",
        keep_candidates=True,
    )


@pytest.fixture(scope="module")
def text_gradients(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Gradient of every weight, inputs and output gradients, for the text's own labels; loss summed over tokens."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":

            def hook(_: Any, arguments: Any, output: Tensor, name: str = name) -> None:
                inputs[name], outputs[name] = arguments[0].detach(), output
                output.retain_grad()

            module.register_forward_hook(hook)
    logits = model(input_ids=TOKENS).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    loss.backward()
    weights = {name: model.get_submodule(name).weight.grad for name in inputs}
    return weights, inputs, {name: y.grad for name, y in outputs.items() if y.grad is not None}


def test_output_errors_of_the_texts_labels_are_autograds(
    gathered: Gathered, seen: dict[str, ModuleEvidence], text_gradients: tuple[dict[str, Tensor], ...]
) -> None:
    weights, inputs, gradients = text_gradients
    tokens = TOKENS.numel()
    assert set(seen) == set(weights)
    for name, evidence in seen.items():
        assert evidence.output_error is not None
        x, g = inputs[name].flatten(0, 1), gradients[name].flatten(0, 1)
        for q, found in zip(evidence.rounded, evidence.output_error, strict=True):
            dW = evidence.W - q.dequantize(torch.float32)
            expected = float((g.double().square() * (x @ dW.T).double().square()).sum() / tokens)
            assert found == pytest.approx(expected, rel=1e-3)


def test_first_order_and_output_error_costs_are_their_formulas(
    gathered: Gathered, text_gradients: tuple[dict[str, Tensor], ...], seen: dict[str, ModuleEvidence]
) -> None:
    weights, _, _ = text_gradients
    for row in gathered.costs["gradient-change"]:
        evidence = seen[row.module.name]
        q = next(q for q in evidence.rounded if q.choice == row.choice)
        change = evidence.W - q.dequantize(torch.float32)
        expected = float((weights[row.module.name] / TOKENS.numel() * change).abs().double().sum())
        assert row.cost_nats == pytest.approx(expected, rel=1e-3)


def test_the_trace_is_the_sum_of_squared_gradients_token_by_token(
    bench: Workbench, text_gradients: tuple[dict[str, Tensor], ...]
) -> None:
    """trace(F) = mean_t |g_t x_t^T|^2; for the text's labels, whose gradients are known here."""
    _, inputs, gradients = text_gradients
    for evidence in bench.walk_back(weightings=(), text_labels=True):
        for name, sums in evidence.modules.items():
            x, g = inputs[name].flatten(0, 1).double(), gradients[name].flatten(0, 1).double()
            expected = float(torch.einsum("ti,tj->tij", g, x).square().sum())
            assert float(sums.trace) == pytest.approx(expected, rel=1e-3)


def test_block_cosine_is_that_of_hidden_states(
    folder: Path, seen: dict[str, ModuleEvidence], gathered: Gathered
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[int, float] = {}
    for index, block in enumerate(model.model.layers):

        def hook(_: Any, arguments: Any, output: Any, index: int = index) -> None:
            y = output[0] if isinstance(output, tuple) else output
            found[index] = float(torch.cosine_similarity(arguments[0], y, dim=-1).mean())

        block.register_forward_hook(hook)
    with torch.no_grad():
        model(input_ids=TOKENS)
    for evidence in seen.values():
        assert evidence.block_cosine == pytest.approx(found[evidence.spec.block], abs=1e-5)


def test_measures_rank_differently_and_none_is_constant(gathered: Gathered) -> None:
    """A measure swapped for ones would give every module of a shape the same cost."""
    for name, rows in gathered.costs.items():
        of_one_kind = {row.cost_nats for row in rows if row.module.kind == "down_proj" and row.choice.bits == 3}
        assert len(of_one_kind) == LAYERS, name
    for name in ("relevance-magnitude", "zd"):
        values = {v for module, v in gathered.scores[name].items() if module.endswith("down_proj")}
        assert len(values) == LAYERS, name
    blocks = {module.split(".")[2]: value for module, value in gathered.scores["lim"].items()}
    assert len(set(blocks.values())) == LAYERS
    assert len(set(gathered.scores["lim"].values())) == LAYERS


def test_costs_from_some_rows_are_near_those_of_all(gathered: Gathered) -> None:
    """Each of its own layer and choice; and they are from some rows, or they would be equal."""
    whole = {(row.module.name, row.choice): row.cost_nats for row in gathered.costs["lrpq"]}
    ratios = [row.cost_nats / whole[row.module.name, row.choice] for row in gathered.costs["sampled"]]
    assert len(ratios) == len(whole)
    assert all(0.6 < ratio < 1.6 for ratio in ratios)
    assert sum(abs(ratio - 1) > 1e-3 for ratio in ratios) > len(ratios) / 2


def test_costs_fall_with_bits(gathered: Gathered) -> None:
    for name, rows in gathered.costs.items():
        for row in rows:
            wider = [r for r in rows if r.module == row.module and r.choice.bits > row.choice.bits]
            if name != "cp-lrp":
                assert all(r.cost_nats < row.cost_nats for r in wider), (name, row.module.name)


def test_token_weights_are_what_they_say(folder: Path, gathered: Gathered, bench: Workbench) -> None:
    stream = bench.stream()
    norms: dict[str, Tensor] = {}
    attention: dict[int, Tensor] = {}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for spec in stream.specs:

        def hook(_: Any, arguments: Any, name: str = f"{spec.block}.{spec.input_site}") -> None:
            norms[name] = arguments[0].flatten(0, 1).square().sum(-1)

        model.get_submodule(spec.name).register_forward_pre_hook(hook)
    with torch.no_grad():
        output = model(input_ids=TOKENS, output_attentions=True)
    for index, pattern in enumerate(output.attentions):
        received = pattern.sum((1, 2))
        low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
        r = 0.005 + 0.995 * (received - low) / (high - low)
        attention[index] = (r / r.mean(1, keepdim=True)).square().flatten()
    for block in range(LAYERS):
        for site, s in gathered.token_weights["inverse-norm"][block].items():
            torch.testing.assert_close(s, 1 / norms[f"{block}.{site}"], rtol=1e-4, atol=0)
        for s in gathered.token_weights["attention"][block].values():
            torch.testing.assert_close(s, attention[block], rtol=1e-3, atol=1e-4)
        for s in gathered.token_weights["none"][block].values():
            assert torch.equal(s, torch.ones(TOKENS.numel()))
    fisher, lrp = (gathered.token_weights[name][0]["qkv"] for name in ("fisher", "lrp"))
    assert not torch.allclose(fisher, lrp, rtol=0.05)


def test_measured_kl_is_the_whole_models(folder: Path, bench: Workbench, gathered: Gathered) -> None:
    choice = Choice(bits=2, group_size=32)
    table = one_at_a_time(bench.stream(), TOKENS, lambda spec: gathered.candidates[spec.name], [choice], micro_batch=2)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        p = model(input_ids=TOKENS).logits[:, :-1].log_softmax(-1)
    assert len(table) == 7 * LAYERS
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.2.mlp.down_proj"):
        layer = model.get_submodule(name)
        original = layer.weight.data
        q = next(q for q in gathered.candidates[name] if q.choice == choice)
        layer.weight.data = q.dequantize(torch.float32)
        with torch.no_grad():
            changed = model(input_ids=TOKENS).logits[:, :-1].log_softmax(-1)
        layer.weight.data = original
        expected = float((p.exp() * (p - changed)).sum(-1).mean())
        assert table[name][choice] == pytest.approx(expected, rel=1e-3)


def test_noise_is_a_function_of_seed_and_name(folder: Path) -> None:
    stream = BlockStream(ModelSource(folder), dtype=torch.float32)
    first, again, other = (noise_factors(stream, TOKENS[:2], seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert all(value > 0 for value in first.values())


def test_measurements_replace_estimates_and_scale_the_rest() -> None:
    narrow, wide, widest = (Choice(bits=b, group_size=64) for b in (2, 3, 4))
    found = filled({"m": {narrow: 8.0, wide: 3.0}}, {"m": {narrow: 4.0, wide: 1.0, widest: 0.25}})
    assert found == {"m": {narrow: 8.0, wide: 3.0, widest: 0.75}}


def test_a_variants_name_is_its_own(folder: Path) -> None:
    from lrpq.errors import QuantizationError

    stream = BlockStream(ModelSource(folder), dtype=torch.float32)
    with pytest.raises(QuantizationError, match="variant same"):
        measure_kl(stream, TOKENS[:1], lambda block: {"same": {}})
