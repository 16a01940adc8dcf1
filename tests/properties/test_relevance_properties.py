"""Properties of label sampling, rules and token weights that hold for any values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrpq.errors import QuantizationError
from lrpq.relevance import rules
from lrpq.relevance.attribute import ModuleStats
from lrpq.relevance.composite import Relevance
from lrpq.relevance.head import nll_seed, sample_labels, sequence_generator
from lrpq.relevance.rules import Pass, PassSwitch
from lrpq.relevance.weights import token_weights

seeds = st.integers(0, 2**31 - 1)
WEIGHTED = [Relevance.FISHER, Relevance.LRP, Relevance.CP_LRP, Relevance.BLEND]
quick = settings(max_examples=25, deadline=None)


def stats(seed: int, tokens: int, d_out: int, scale: float = 1.0, only: Pass | None = None) -> ModuleStats:
    """Random sums, heavy-tailed over tokens; ``scale`` multiplies the pass ``only`` or all of them."""
    generator = torch.Generator().manual_seed(seed)
    sums = {p: torch.randn(tokens, generator=generator).mul(3).exp() for p in Pass}
    scaled = {p: s * scale if only in (None, p) else s for p, s in sums.items()}
    return ModuleStats(d_out=d_out, token_sums=scaled, channel_sums=torch.ones(d_out, dtype=torch.float64))


def site(seed: int, scale: float = 1.0, only: Pass | None = None) -> list[ModuleStats]:
    return [stats(seed + i, 12, 4 + i, scale, only) for i in range(3)]


# --- token weights --------------------------------------------------------------------------------


@quick
@given(seeds, st.sampled_from([1e-12, 1e-4, 3.0, 1e6]), st.sampled_from(WEIGHTED))
def test_scaling_all_gradients_leaves_the_relative_weights(seed: int, scale: float, relevance: Relevance) -> None:
    plain = token_weights(site(seed), relevance, site="qkv")
    scaled = token_weights(site(seed, scale), relevance, site="qkv")
    torch.testing.assert_close(scaled, plain * scale, rtol=1e-5, atol=0)  # the absolute scale is kept
    torch.testing.assert_close(scaled / scaled.mean(), plain / plain.mean(), rtol=1e-5, atol=0)


@quick
@given(seeds, st.sampled_from([1e-8, 0.1, 1e5]))
def test_blend_does_not_depend_on_the_scale_of_the_lrp_pass(seed: int, scale: float) -> None:
    plain = token_weights(site(seed), Relevance.BLEND, site="o")
    scaled = token_weights(site(seed, scale, Pass.LRP), Relevance.BLEND, site="o")
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=0)


@quick
@given(seeds)
def test_blend_is_the_geometric_mean_with_the_fishers_mean(seed: int) -> None:
    module = stats(seed, 12, 4)
    fisher, lrp = (module.token_sums[p].double() / 4 for p in (Pass.FISHER, Pass.LRP))
    blend = token_weights([module], Relevance.BLEND, site="o", floor=0.0).double()
    torch.testing.assert_close(blend.mean(), fisher.mean(), rtol=1e-5, atol=0)
    ratio = blend.square() / (fisher * lrp)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)


@quick
@given(seeds, st.sampled_from(WEIGHTED), st.floats(0.0, 1.0))
def test_weights_are_non_negative_finite_and_at_least_the_floor(seed: int, relevance: Relevance, floor: float) -> None:
    bare = token_weights(site(seed), relevance, site="down", floor=0.0)
    weights = token_weights(site(seed), relevance, site="down", floor=floor)
    assert torch.isfinite(weights).all()
    assert (weights >= floor * bare.mean()).all()
    torch.testing.assert_close(weights, bare + floor * bare.mean())


@quick
@given(seeds, st.sampled_from(WEIGHTED))
def test_a_site_averages_the_mean_squared_gradients_of_its_modules(seed: int, relevance: Relevance) -> None:
    modules = site(seed)
    together = token_weights(modules, relevance, site="qkv", floor=0.0)
    apart = torch.stack([token_weights([m], relevance, site="qkv", floor=0.0) for m in modules])
    torch.testing.assert_close(together, apart.mean(0))
    if relevance is Relevance.FISHER:
        torch.testing.assert_close(apart[1], modules[1].token_sums[Pass.FISHER] / modules[1].d_out)


def test_blend_does_not_underflow_where_the_product_would() -> None:
    tiny = stats(5, 12, 4, 1e-25)
    assert not (tiny.token_sums[Pass.FISHER] * tiny.token_sums[Pass.LRP]).all()
    plain = token_weights([stats(5, 12, 4)], Relevance.BLEND, site="o")
    torch.testing.assert_close(
        token_weights([tiny], Relevance.BLEND, site="o") / plain, torch.full((12,), 1e-25), rtol=1e-4, atol=0
    )


def test_no_relevance_weighs_every_token_the_same() -> None:
    assert torch.equal(token_weights(site(1), Relevance.NONE, site="qkv"), torch.ones(12))


@pytest.mark.parametrize("relevance", WEIGHTED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unusable_weights_are_refused_with_the_name_of_the_site(relevance: Relevance, bad: float) -> None:
    with pytest.raises(QuantizationError, match="site gate_up"):
        token_weights(site(2, bad), relevance, site="gate_up")


def test_every_relevance_runs_the_fisher_pass() -> None:
    assert {r: set(r.passes) - {Pass.FISHER} for r in Relevance} == {
        Relevance.NONE: set(),
        Relevance.FISHER: set(),
        Relevance.LRP: {Pass.LRP},
        Relevance.CP_LRP: {Pass.CP_LRP},
        Relevance.BLEND: {Pass.LRP},
    }
    assert all(Pass.FISHER in r.passes for r in Relevance)


# --- label sampling -------------------------------------------------------------------------------


@quick
@given(seeds, st.integers(1, 40), st.integers(1, 40))
def test_labels_do_not_depend_on_how_tokens_are_cut_into_chunks(seed: int, tokens: int, chunk: int) -> None:
    logits = torch.randn(tokens, 17, generator=torch.Generator().manual_seed(seed))
    whole = sample_labels(logits, sequence_generator(seed, 0))
    generator = sequence_generator(seed, 0)
    assert torch.equal(whole, torch.cat([sample_labels(part, generator) for part in logits.split(chunk)]))


def test_a_label_of_probability_zero_is_not_drawn_even_by_the_number_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(*shape, dtype=torch.float64))
    logits = torch.tensor([[-torch.inf, -torch.inf, 0.5, 0.0]])
    assert sample_labels(logits, sequence_generator(0, 0)).tolist() == [2]


def test_labels_follow_the_softmax() -> None:
    draws = 200_000
    logits = torch.tensor([0.0, 2.0, -torch.inf, 1.0, -3.0, -torch.inf])
    labels = sample_labels(logits.expand(draws, -1), sequence_generator(0, 0))
    expected = torch.softmax(logits.double(), 0)
    found = torch.bincount(labels, minlength=6) / draws
    assert found[2] == found[5] == 0
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((found - expected).abs() <= 4 * deviation).all()


def test_sampled_labels_give_a_gradient_of_mean_zero() -> None:
    # What sets the true Fisher apart from the empirical one: E[softmax - onehot] = 0 under the model itself.
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(50_000, -1)
    sampled = nll_seed(logits, sample_labels(logits, sequence_generator(1, 0))).mean(0)
    fixed = nll_seed(logits, torch.zeros(50_000, dtype=torch.int64)).mean(0)
    assert sampled.abs().max() < 0.01
    assert fixed.abs().max() > 0.1


@quick
@given(seeds)
def test_nll_seed_is_the_gradient_of_the_cross_entropy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(9, (6,), generator=generator)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(nll_seed(logits.detach(), labels), expected)


def test_generators_differ_by_seed_and_sequence_and_repeat_themselves() -> None:
    def draw(seed: int, index: int) -> tuple[float, ...]:
        return tuple(torch.rand(4, generator=sequence_generator(seed, index)).tolist())

    pairs = [(0, 0), (0, 1), (1, 0), (1, 10), (11, 0)]
    assert len({draw(*pair) for pair in pairs}) == len(pairs)
    assert all(draw(*pair) == draw(*pair) for pair in pairs)


def test_generators_are_the_same_in_every_process_and_version() -> None:
    # a constant: Python's hash() would differ in every process, and stored runs depend on these labels
    assert sequence_generator(7, 3).initial_seed() == 4065719125946297091
    assert (
        torch.rand(1, generator=sequence_generator(7, 3)).item()
        == torch.rand(1, generator=torch.Generator().manual_seed(4065719125946297091)).item()
    )


# --- rules ----------------------------------------------------------------------------------------


@quick
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
def test_stabilize_keeps_the_sign_and_moves_away_from_zero(values: list[float]) -> None:
    z = torch.tensor(values)
    moved = rules.stabilize(z)
    assert (moved.abs() >= z.abs()).all()
    assert (moved != 0).all()
    assert ((moved < 0) == (z < 0)).all()


@quick
@given(seeds, st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_rules_never_change_values_and_fisher_is_plain_autograd(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    switch = PassSwitch()
    z, up, g = (torch.randn(3, 8, generator=generator).to(dtype) for _ in range(3))

    def gradients(product: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(product, inputs, g)

    plain = [t.clone().requires_grad_() for t in (z, up)]
    ruled = [t.clone().requires_grad_() for t in (z, up)]
    y_plain = torch.nn.functional.silu(plain[0]) * plain[1]
    y_ruled = rules.half_product(rules.identity_rule(torch.nn.functional.silu, ruled[0], switch), ruled[1], switch)
    assert torch.equal(y_plain, y_ruled)
    for a, b in zip(gradients(y_plain, *plain), gradients(y_ruled, *ruled), strict=True):
        assert torch.equal(a, b)
