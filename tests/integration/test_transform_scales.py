"""How scales are chosen: by the error of rounded layers (AWQ), by the whole rounded model (SmoothQuant+)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import write_llama
from tiny_models import VOCABULARY, write_tiny
from transformers import AutoModelForCausalLM

from lrpq.errors import CalibrationError, QuantizationError
from lrpq.evaluate.divergence import score_windows, summarize
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.source import open_source
from lrpq.model.streaming import BlockStream
from lrpq.quant.rtn import round_to_nearest
from lrpq.transform import smoothing as smoothing_module
from lrpq.transform.awq import awq_factor, search_awq, search_pair
from lrpq.transform.inputs import site_sums
from lrpq.transform.smoothing import LayerScale, Pair, smooth, smoothable_pairs
from lrpq.transform.smoothquant import PLAIN, search_smoothquant, smoothquant_factor

CHOICE = Choice(bits=3, group_size=32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(num: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 8, (num, 24), generator=seeded(5))


def pair_of(d_in: int, d_out: int, *, head_size: int | None = None, heads_per_feed: int = 1) -> Pair:
    layer = LinearSpec(name="layer", block=0, d_out=d_out, d_in=d_in, input_site="site", fused_group="layer")
    size = head_size or d_in
    return Pair(
        block=0, site="site", feed="f", is_norm=True, layers=(layer,), head_size=size, heads_per_feed=heads_per_feed
    )


def inputs(*, outliers: float) -> torch.Tensor:
    X = torch.randn(200, 64, generator=seeded(1))
    X[:, ::16] *= outliers
    return X


def output_error(W: torch.Tensor, X: torch.Tensor, factor: torch.Tensor) -> float:
    """Mean squared error of the outputs, computed on the outputs."""
    s = factor.float()
    Q = round_to_nearest(W * s, CHOICE).dequantize()
    return float(((X / s) @ Q.T - X @ W.T).square().sum(1).mean())


def test_awq_lowers_the_error_where_channels_stand_out() -> None:
    X, W = inputs(outliers=30.0), torch.randn(48, 64, generator=seeded(2))
    best, found = search_pair(pair_of(64, 48), [W], X.abs().mean(0).double(), X.T @ X / len(X), CHOICE)
    assert best is not None
    assert 0 < best.alpha == found.alpha < 1
    assert found.error < 0.6 * found.plain_error
    assert found.plain_error == pytest.approx(output_error(W, X, torch.ones(64)), rel=1e-3)
    assert found.error == pytest.approx(output_error(W, X, best.factor), rel=1e-3)
    assert bool((best.factor[::16] > best.factor[1]).all())


@pytest.mark.parametrize("case", ["equal channels", "exact weights"])
def test_awq_scales_nothing_where_nothing_is_gained(case: str) -> None:
    X, W = inputs(outliers=30.0), torch.zeros(48, 64)
    if case == "equal channels":
        X, W = torch.randn(200, 64, generator=seeded(1)).sign(), torch.randn(48, 64, generator=seeded(2))
    best, found = search_pair(pair_of(64, 48), [W], X.abs().mean(0).double(), X.T @ X / len(X), CHOICE)
    assert best is None
    assert found.alpha == 0
    assert found.error == found.plain_error


def test_awq_factors_are_centred_and_bounded() -> None:
    mean_abs = torch.tensor([0.0, 1e-9, 0.5, 2.0, 8.0])
    assert torch.equal(awq_factor(mean_abs, 0.0), torch.ones(5, dtype=torch.float64))
    factor = awq_factor(mean_abs, 0.5)
    assert float(factor.max() * factor.min()) == pytest.approx(1.0)
    assert float(factor[4] / factor[2]) == pytest.approx(4.0)
    assert float(factor[4] / factor[0]) == pytest.approx(100.0)  # a dead channel is floored, not divided by zero


def test_smoothquant_factors_are_the_papers() -> None:
    X, W = torch.tensor([4.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 1.0, 0.0])
    factor = smoothquant_factor(pair_of(4, 4), X, W, 0.5)
    assert torch.allclose(factor, torch.tensor([2.0, 2**0.5, 1.0, 1.0], dtype=torch.float64))
    assert torch.allclose(smoothquant_factor(pair_of(4, 4), X, W, 1.0)[:2], X[:2].double())
    assert torch.allclose(smoothquant_factor(pair_of(4, 4), X, W, 0.0)[:2], 1 / W[:2].double())


def test_heads_of_a_group_share_a_factor() -> None:
    pair = pair_of(12, 4, head_size=2, heads_per_feed=3)  # heads 0, 1, 2 read value head 0; 3, 4, 5 value head 1
    factor = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = torch.tensor([1.0, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4])
    assert torch.equal(pair.on_inputs(factor), expected)
    assert torch.equal(pair.by_head(expected).amax(1).flatten(), factor)
    assert pair.num_factors == 4


def test_sums_are_those_of_the_models_own_inputs(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[tuple[int, str], torch.Tensor] = {}
    stream = BlockStream(open_source(folder), dtype=torch.float32)
    for block in range(stream.num_blocks):
        for site, layers in stream.sites(block).items():
            for layer in layers:
                model.get_submodule(layer.name).register_forward_pre_hook(
                    lambda _, arguments, key=(block, site): seen.__setitem__(key, arguments[0])
                )
    with torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
    found = site_sums(
        stream,
        tokens(),
        empty=lambda d_in: torch.zeros(d_in),
        add=lambda sums, X: sums + X.abs().sum(0),
        merge=torch.add,
    )
    compared = 0
    for block, sums in found:
        for site, total in sums.items():
            assert torch.allclose(total, seen[block, site].abs().flatten(0, 1).sum(0), rtol=1e-4)
            compared += 1
    assert compared == len(seen) == 8
    with pytest.raises(CalibrationError, match="no calibration tokens"):
        list(site_sums(stream, tokens()[:0], empty=torch.zeros, add=torch.add, merge=torch.add))


def test_one_block_at_a_time(tmp_path: Path) -> None:
    """Weights of the other blocks are on no device while one computes."""
    stream = BlockStream(open_source(write_llama(tmp_path / "model")), dtype=torch.float32)
    for block, _ in site_sums(stream, tokens() % 128, empty=torch.zeros, add=lambda a, _: a, merge=torch.add):
        real = [i for i, b in enumerate(stream.blocks) if not all(p.is_meta for p in b.parameters())]
        assert real == [block]


def kl(folder: Path, reference: Path, windows: torch.Tensor) -> float:
    """Of the model in ``folder``, its layers rounded, to the reference; with plain transformers."""
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (reference, folder)]
    with torch.no_grad():
        for module in models[1].model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(round_to_nearest(module.weight, CHOICE).dequantize())
        p, q = (m(input_ids=windows, use_cache=False).logits[:, :-1].log_softmax(-1) for m in models)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_smoothquant_takes_the_exponent_that_is_best_for_the_model(tmp_path: Path) -> None:
    """What the search says of an exponent is what the written folder has when its layers are rounded."""
    folder = write_tiny(tmp_path / "model", "llama-rope-scaled")
    stream = BlockStream(open_source(folder), dtype=torch.float32)
    found = search_smoothquant(stream, tokens(), CHOICE, alphas=(0.3, 0.5, 0.9))
    scores: Mapping[str, float] = {name: s.kl_nats for name, s in found.candidates.items()}
    assert set(scores) == {PLAIN, "0.3", "0.5", "0.9"}
    assert str(found.alpha) == min(scores, key=scores.__getitem__)
    assert scores[str(found.alpha)] < scores[PLAIN]
    smooth(open_source(folder), tmp_path / "smoothed", found.smoothing)
    assert kl(tmp_path / "smoothed", folder, tokens()) == pytest.approx(scores[str(found.alpha)], rel=1e-3)
    assert kl(folder, folder, tokens()) == pytest.approx(scores[PLAIN], rel=1e-3)


def test_smoothquant_scales_nothing_where_nothing_is_gained(tmp_path: Path) -> None:
    stream = BlockStream(open_source(write_tiny(tmp_path / "model", "llama")), dtype=torch.float32)
    found = search_smoothquant(stream, tokens(), CHOICE, alphas=())
    assert found.alpha is None
    assert found.smoothing.scales == ()
    report = smooth(stream.source, tmp_path / "same", found.smoothing)
    assert report.folded == ()
    assert (tmp_path / "same/model.safetensors").stat().st_size > 0


def test_awq_helps_the_whole_model_and_repeats(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "mistral")
    stream = BlockStream(open_source(folder), dtype=torch.float32)
    found = search_awq(stream, tokens(), CHOICE)
    again = search_awq(stream, tokens(), CHOICE)
    assert found.sites == again.sites
    assert all(site.error <= site.plain_error for site in found.sites)
    assert [(s.block, s.site) for s in found.sites if s.alpha > 0] == [
        (s.pair.block, s.pair.site) for s in found.smoothing.scales
    ]
    for a, b in zip(found.smoothing.scales, again.smoothing.scales, strict=True):
        assert torch.equal(a.factor, b.factor)
    smooth(open_source(folder), tmp_path / "smoothed", found.smoothing)
    unseen = torch.randint(3, VOCABULARY - 8, (4, 24), generator=seeded(9))
    assert kl(tmp_path / "smoothed", folder, unseen) < kl(folder, folder, unseen)


def test_a_choice_that_fits_no_layer_is_refused(tmp_path: Path) -> None:
    stream = BlockStream(open_source(write_tiny(tmp_path / "model", "llama")), dtype=torch.float32)
    with pytest.raises(QuantizationError, match="group size 128 does not divide its 64 inputs"):
        search_awq(stream, tokens(), Choice(bits=4, group_size=128))


def test_heads_that_do_not_group_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(smoothing_module, "num_value_heads", lambda config: 3)  # 48 values for 64 inputs
    stream = BlockStream(open_source(folder), dtype=torch.float32)
    pairs, skipped = smoothable_pairs(stream, 1)
    assert [pair.site for pair in pairs] == ["qkv", "gate_up", "down"]
    assert [(pair.block, pair.site) for pair in skipped] == [(1, "o")]
    assert "64 inputs are no whole number of groups of 48 values" in skipped[0].reason
    report = smooth(stream.source, tmp_path / "smoothed", search_awq(stream, tokens(), CHOICE).smoothing)
    assert [(pair.block, pair.site) for pair in report.skipped] == [(0, "o"), (1, "o")]


def test_layer_scales_are_undone() -> None:
    W = torch.randn(6, 4, generator=seeded(1))
    scale = LayerScale(columns=torch.rand(4).double() + 0.5, last_rows=torch.rand(2).double() + 0.5)
    assert not torch.allclose(scale.apply(W), W)
    assert torch.allclose(scale.undo(scale.apply(W)), W)
    assert torch.equal(LayerScale().apply(W), W)


def test_scores_are_those_of_score_windows(tmp_path: Path) -> None:
    """Plain rounding as a variant of its own gives the same number as the search's."""
    stream = BlockStream(open_source(write_tiny(tmp_path / "model", "llama")), dtype=torch.float32)

    def rounded(block: int) -> dict[str, torch.Tensor]:
        return {
            spec.name: round_to_nearest(stream.weight(spec), CHOICE).dequantize() for spec in stream.block_specs(block)
        }

    expected = summarize(score_windows(stream, tokens(), {"rounded": rounded})["rounded"])
    assert search_smoothquant(stream, tokens(), CHOICE, alphas=(0.5,)).candidates[PLAIN] == expected
