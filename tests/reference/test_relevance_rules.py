"""Every rule against its explicit matrix form, in float64: relevance = value x modified gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lrpq.relevance import rules
from lrpq.relevance.attention import attention_patch, relevance_attention
from lrpq.relevance.composite import fused_gated_mlp, gated_mlp, routed_experts
from lrpq.relevance.rules import Pass, PassSwitch

RULE_PASSES = [Pass.LRP, Pass.CP_LRP]
T, H, V = 5, 6, 7


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def leaf(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def grads(y: Tensor, inputs: list[Tensor], g: Tensor, switch: PassSwitch, running: Pass) -> list[Tensor]:
    """Gradients of one pass; the graph stays, a missing gradient is zero."""
    with switch.running(running):
        found = torch.autograd.grad(y, inputs, g, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if d is None else d for x, d in zip(inputs, found, strict=True)]


def close(a: Tensor, b: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-14)


# --- stabilize ------------------------------------------------------------------------------------


def test_stabilize_is_signed_and_sends_zero_to_plus_epsilon() -> None:
    z = torch.tensor([-2.0, -1e-12, -0.0, 0.0, 1e-12, 2.0], dtype=torch.float64)
    expected = torch.tensor([-2.0 - 1e-9, -1e-12 - 1e-9, 1e-9, 1e-9, 1e-12 + 1e-9, 2.0 + 1e-9], dtype=torch.float64)
    assert torch.equal(rules.stabilize(z), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stabilize_never_returns_zero_in_any_dtype(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    z = torch.tensor([0.0, -0.0, tiny, -tiny, -1e-9, 1e-9], dtype=dtype)
    assert (rules.stabilize(z) != 0).all()
    assert torch.isfinite(1 / rules.stabilize(z).double()).all()


# --- linear layers, identity, products, norms -----------------------------------------------------


@pytest.mark.parametrize("running", RULE_PASSES)
def test_linear_layer_is_zero_lrp(generator: torch.Generator, running: Pass) -> None:
    # 0-LRP: R_i = sum_j  x_i w_ji / y_j  R_j
    x, weight = leaf(generator, T, H), leaf(generator, V, H)
    y = functional.linear(x, weight)
    r_out = torch.randn(T, V, dtype=torch.float64, generator=generator)
    shares = x[:, None, :] * weight[None] / y[..., None]
    expected = (shares * r_out[..., None]).sum(1)
    (g,) = grads(y, [x], r_out / y.detach(), PassSwitch(), running)
    close((x * g).detach(), expected.detach(), rtol=1e-10)


@pytest.mark.parametrize("activation", [functional.silu, functional.gelu, torch.tanh, torch.relu])
@pytest.mark.parametrize("running", RULE_PASSES)
def test_identity_rule_passes_relevance_unchanged(
    generator: torch.Generator, activation: Callable[[Tensor], Tensor], running: Pass
) -> None:
    z, switch = leaf(generator, 40), PassSwitch()
    y = rules.identity_rule(activation, z, switch)
    g = torch.randn(40, dtype=torch.float64, generator=generator)
    (got,) = grads(y, [z], g, switch, running)
    close(got, (g * activation(z) / rules.stabilize(z)).detach())
    # |z| > 1e-3 in this draw: the stabiliser takes less than 1e-6 of the relevance
    close((z * got).detach(), (y * g).detach(), rtol=1e-6)
    (true,) = grads(activation(z), [z], g, switch, running)
    # of a piecewise linear activation act(z)/z is the derivative; of a curved one it is not
    assert torch.allclose(got, true) == (activation is torch.relu)


def test_identity_rule_is_finite_at_and_around_zero() -> None:
    z = torch.tensor([0.0, -0.0, -1e-12, 1e-12, -1e-9], dtype=torch.float32).requires_grad_()
    switch = PassSwitch()
    y = rules.identity_rule(functional.silu, z, switch)
    (got,) = grads(y, [z], torch.ones(5), switch, Pass.LRP)
    assert torch.isfinite(got).all()
    assert (got >= 0).all()
    assert (got <= 0.5).all()


def test_half_rule_splits_the_relevance_of_a_product(generator: torch.Generator) -> None:
    gate, value, switch = leaf(generator, T, H), leaf(generator, T, H), PassSwitch()
    y = rules.half_product(gate, value, switch)
    g = torch.randn(T, H, dtype=torch.float64, generator=generator)
    r_out = (y * g).detach()
    for inputs, running, share in [
        ((gate, value), Pass.LRP, (0.5, 0.5)),
        ((gate, value), Pass.CP_LRP, (0.0, 1.0)),
        ((gate, value), Pass.FISHER, (1.0, 1.0)),  # the plain gradient counts the relevance twice
    ]:
        for x, got, part in zip(inputs, grads(y, list(inputs), g, switch, running), share, strict=True):
            close((x * got).detach(), part * r_out)


@pytest.mark.parametrize("running", RULE_PASSES)
@pytest.mark.parametrize("norm", [rules.rms_norm, rules.rms_norm_unit_offset])
def test_rms_norm_has_a_constant_normaliser(generator: torch.Generator, norm: Any, running: Pass) -> None:
    x, weight, switch = (
        leaf(generator, T, H),
        torch.randn(H, dtype=torch.float64, generator=generator),
        PassSwitch(),
    )
    gain = weight if norm is rules.rms_norm else 1 + weight
    y = norm(x, weight, 1e-5, switch)
    g = torch.randn(T, H, dtype=torch.float64, generator=generator)
    normaliser = (x.detach().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close(y.detach(), gain * x.detach() / normaliser)
    (got,) = grads(y, [x], g, switch, running)
    close(got, gain * g / normaliser)  # the matrix diag(gain) / normaliser, transposed
    close((x * got).sum(-1).detach(), (y * g).sum(-1).detach())
    (true,) = grads(y, [x], g, switch, Pass.FISHER)
    # the true Jacobian projects out x (up to epsilon), so plain gradient x input loses all of the relevance
    assert ((x * true).sum(-1).abs() < 1e-3 * (y * g).sum(-1).abs()).all()


@pytest.mark.parametrize("running", RULE_PASSES)
def test_layer_norm_has_a_constant_deviation_and_a_differentiated_mean(
    generator: torch.Generator, running: Pass
) -> None:
    x, switch = leaf(generator, T, H), PassSwitch()
    weight, bias = (torch.randn(H, dtype=torch.float64, generator=generator) for _ in range(2))
    y = rules.layer_norm(x, weight, bias, 1e-5, switch)
    assert torch.equal(y, functional.layer_norm(x, (H,), weight, bias, 1e-5))
    g = torch.randn(T, H, dtype=torch.float64, generator=generator)
    deviation = (x.detach().var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    centring = torch.eye(H, dtype=torch.float64) - 1.0 / H
    (got,) = grads(y, [x], g, switch, running)
    close(got, (weight * g / deviation) @ centring)
    (true,) = grads(y, [x], g, switch, Pass.FISHER)
    plain = functional.layer_norm(x, (H,), weight, bias, 1e-5)
    (expected,) = torch.autograd.grad(plain, x, g)
    assert torch.equal(true, expected)
    assert not torch.allclose(true, got)


# --- fused gates, routed experts ------------------------------------------------------------------


class TinyMLP(nn.Module):
    """What gated_mlp and fused_gated_mlp ask of a module: the same weights, apart and stacked."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_proj: Callable[[Tensor], Tensor] = lambda x: x @ gate.T
        self.up_proj: Callable[[Tensor], Tensor] = lambda x: x @ up.T
        self.gate_up_proj: Callable[[Tensor], Tensor] = lambda x: x @ torch.cat([gate, up]).T
        self.down_proj: Callable[[Tensor], Tensor] = lambda h: h @ down.T
        self.act_fn = self.activation_fn = functional.silu


@pytest.mark.parametrize("running", list(Pass))
def test_fused_gate_and_up_are_those_of_two_layers(generator: torch.Generator, running: Pass) -> None:
    gate, up, down = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in [(V, H), (V, H), (H, V)])
    mlp, switch, x = TinyMLP(gate, up, down), PassSwitch(), leaf(generator, T, H)
    g = torch.randn(T, H, dtype=torch.float64, generator=generator)
    outputs = []
    for rule in (fused_gated_mlp, gated_mlp):
        forward: Any = rule(mlp, switch)["forward"]
        outputs.append(forward(x))
    close(outputs[0].detach(), outputs[1].detach())
    fused, apart = (grads(y, [x], g, switch, running)[0] for y in outputs)
    close(fused, apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # Mixtral's router weights stay float32
def test_fisher_pass_of_a_routed_product_is_plain_autograd_bit_for_bit(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    y = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.rand(T, 1, generator=generator).requires_grad_()
    g = torch.randn(T, H, generator=generator)
    ruled, plain, switch = rules.routed_product(y, weight, PassSwitch()), y * weight, PassSwitch()
    assert torch.equal(ruled, plain)
    for got, expected in zip(
        grads(ruled, [y, weight], g, switch, Pass.FISHER),
        grads(plain, [y, weight], g, switch, Pass.FISHER),
        strict=True,
    ):
        assert torch.equal(got, expected)


class TinyExperts(nn.Module):
    """What routed_experts asks of a module: its two products as methods; every expert runs on every token."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        self.gated: Callable[[Tensor, Tensor], Tensor]
        self.weighted: Callable[[Tensor, Tensor], Tensor]
        self.act_fn: Callable[[Tensor], Tensor] = functional.silu

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        outputs = [
            self.weighted(self.gated(x @ self.gate[e].T, x @ self.up[e].T) @ self.down[e].T, weights[:, e, None])
            for e in range(len(self.gate))
        ]
        return torch.stack(outputs).sum(0)


@pytest.mark.parametrize("running", RULE_PASSES)
def test_routed_experts_share_the_relevance_with_their_router_weights(
    generator: torch.Generator, running: Pass
) -> None:
    # Written out for expert e with a = act(z_e), up_e, o_e and weight w_e; R_out is what leaves the weighted output:
    # R_w = R_out / 2; R_o = R_out / 2; down, then gate and up take half each. CP_LRP: all to o_e, then all to up_e.
    switch, num_experts = PassSwitch(), 3
    gate, up = (torch.randn(num_experts, V, H, dtype=torch.float64, generator=generator) for _ in range(2))
    down = torch.randn(num_experts, H, V, dtype=torch.float64, generator=generator)
    x, weights = leaf(generator, T, H), leaf(generator, T, num_experts)
    module = TinyExperts(gate, up, down)
    module.act_fn = lambda z: rules.identity_rule(functional.silu, z, switch)
    for name, value in routed_experts(module, switch).items():
        module.__dict__[name] = value
    y = module(x, weights)
    g = torch.randn(T, H, dtype=torch.float64, generator=generator)
    g_x, g_weights = grads(y, [x, weights], g, switch, running)

    to_expert, to_router, to_up, to_gate = (0.5, 0.5, 0.5, 0.5) if running is Pass.LRP else (1.0, 0.0, 1.0, 0.0)
    with torch.no_grad():
        r_x, r_weights = torch.zeros(T, H, dtype=torch.float64), torch.zeros(T, num_experts, dtype=torch.float64)
        for e in range(num_experts):
            z, u = x @ gate[e].T, x @ up[e].T
            hidden = functional.silu(z) * u
            output = hidden @ down[e].T
            r_out = weights[:, e, None] * output * g
            r_weights[:, e] = to_router * r_out.sum(-1)
            per_output = to_expert * r_out / output
            r_hidden = hidden * (per_output @ down[e])
            r_x += x * ((to_up * r_hidden / u) @ up[e] + (to_gate * r_hidden / z) @ gate[e])
        close(x * g_x, r_x, rtol=1e-6)  # the stabiliser of act(z) / z
        close(weights * g_weights, r_weights, rtol=1e-9)
        close((x * g_x).sum() + (weights * g_weights).sum(), (y * g).sum(), rtol=1e-6)  # conserved together


# --- attention ------------------------------------------------------------------------------------


class TinyAttention(nn.Module):
    """What relevance_attention asks of a module."""

    def __init__(self, implementation: str, groups: int = 1) -> None:
        super().__init__()
        self.config = type("Config", (), {"_attn_implementation": implementation})()
        self.num_key_value_groups = groups
        self.is_causal = True


def attention_relevance(
    q: Tensor, k: Tensor, v: Tensor, r_out_per_unit: Tensor, scaling: float
) -> tuple[dict[str, Tensor], Tensor]:
    """AttnLRP of causal attention written out: relevances, and what the softmax keeps back (its residual).

    matmul: R_A = A * (R_O / 2 O) V^T and R_V = V * A^T (R_O / 2 O); softmax: R = x (R_A - s sum R_A); then
    the product q k^T the same way. ``r_out_per_unit`` is R_O / O, the upstream modified gradient.
    """
    t = q.shape[-2]
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2)) * scaling
    pattern = torch.softmax(scores.masked_fill(~causal, -torch.inf), -1)
    r_v = v * (pattern.transpose(-1, -2) @ (r_out_per_unit / 2))
    r_pattern = pattern * ((r_out_per_unit / 2) @ v.transpose(-1, -2))
    r_scores = scores * (r_pattern - pattern * r_pattern.sum(-1, keepdim=True))  # 0 where masked: pattern is 0
    per_unit = r_scores / (2 * scores)
    r_q = q * (per_unit @ k) * scaling
    r_k = k * (per_unit.transpose(-1, -2) @ q) * scaling
    return {"q": r_q, "k": r_k, "v": r_v}, r_pattern.sum() - r_scores.sum()


def patched_attention(module: nn.Module, switch: PassSwitch) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    for name, value in attention_patch(module, switch).items():
        module.__dict__[name] = value
    return lambda q, k, v: relevance_attention(module, q, k, v, None, scaling=0.5)[0].transpose(1, 2)


def test_attention_is_attn_lrp_with_the_softmax_residual_explicit(generator: torch.Generator) -> None:
    switch = PassSwitch()
    q, k, v = (leaf(generator, 2, 3, T, 4) for _ in range(3))
    out = patched_attention(TinyAttention("sdpa"), switch)(q, k, v)
    g = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    expected, residual = attention_relevance(q.detach(), k.detach(), v.detach(), g, 0.5)
    total = torch.zeros((), dtype=torch.float64)
    for x, got, name in zip((q, k, v), grads(out, [q, k, v], g, switch, Pass.LRP), "qkv", strict=True):
        close((x * got).detach(), expected[name], rtol=1e-9)
        total += (x * got).detach().sum()
    # conservation of this rule: what arrives is what left, less what the softmax keeps
    close(total + residual, (out * g).detach().sum(), rtol=1e-10)
    assert residual.abs() > 1e-3  # otherwise this draw could not tell


def test_attention_pattern_is_constant_in_cp_lrp(generator: torch.Generator) -> None:
    switch = PassSwitch()
    q, k, v = (leaf(generator, 1, 2, T, 4) for _ in range(3))
    out = patched_attention(TinyAttention("sdpa"), switch)(q, k, v)
    g = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    g_q, g_k, g_v = grads(out, [q, k, v], g, switch, Pass.CP_LRP)
    assert not g_q.any()
    assert not g_k.any()
    scores = (q @ k.transpose(-1, -2)) * 0.5
    pattern = torch.softmax(scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf), -1)
    close(g_v, (pattern.transpose(-1, -2) @ g).detach())
    close((v * g_v).sum().detach(), (out * g).sum().detach())


def test_a_bias_of_the_scores_takes_its_share(generator: torch.Generator) -> None:
    """Windowed attention: bias by position plus a mask of -100, constants of the rules. Written out as above; an
    addition gives each term its share of the sum (0-LRP)."""
    switch, module = PassSwitch(), TinyAttention("sdpa")
    for name, value in attention_patch(module, switch).items():
        module.__dict__[name] = value
    q, k, v = (leaf(generator, 2, 3, T, 4) for _ in range(3))
    bias = torch.randn(2, 3, T, T, dtype=torch.float64, generator=generator)
    bias[1, :, :2, 2:] -= 100.0
    out = relevance_attention(module, q, k, v, bias, scaling=0.5)[0].transpose(1, 2)
    g = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        scores = (q @ k.transpose(-1, -2)) * 0.5
        x = scores + bias
        pattern = torch.softmax(x, -1)
        r_v = v * (pattern.transpose(-1, -2) @ (g / 2))
        r_pattern = pattern * ((g / 2) @ v.transpose(-1, -2))
        r_x = x * (r_pattern - pattern * r_pattern.sum(-1, keepdim=True))
        r_scores, r_bias = r_x * scores / x, r_x * bias / x
        per_unit = r_scores / (2 * scores)
        r_q, r_k = q * (per_unit @ k) * 0.5, k * (per_unit.transpose(-1, -2) @ q) * 0.5
        residual = r_pattern.sum() - r_x.sum()
    for x_, got, expected in zip((q, k, v), grads(out, [q, k, v], g, switch, Pass.LRP), (r_q, r_k, r_v), strict=True):
        close((x_ * got).detach(), expected, rtol=1e-9)
    total = r_q.sum() + r_k.sum() + r_v.sum() + r_bias.sum() + residual
    close(total, (out * g).detach().sum(), rtol=1e-10)
    assert r_bias.sum().abs() > 1e-2
    g_q, g_k, g_v = grads(out, [q, k, v], g, switch, Pass.CP_LRP)
    assert not g_q.any()
    assert not g_k.any()
    close(g_v, (pattern.transpose(-1, -2) @ g).detach())


def test_grouped_queries_sum_into_their_shared_key_and_value(generator: torch.Generator) -> None:
    switch = PassSwitch()
    q, k, v = leaf(generator, 1, 4, T, 4), leaf(generator, 1, 2, T, 4), leaf(generator, 1, 2, T, 4)
    out = patched_attention(TinyAttention("sdpa", groups=2), switch)(q, k, v)
    g = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    wide_k, wide_v = (x.detach().repeat_interleave(2, dim=1) for x in (k, v))
    expected, _ = attention_relevance(q.detach(), wide_k, wide_v, g, 0.5)
    g_q, g_k, g_v = grads(out, [q, k, v], g, switch, Pass.LRP)
    close((q * g_q).detach(), expected["q"], rtol=1e-9)
    close((k * g_k).detach(), expected["k"].unflatten(1, (2, 2)).sum(2), rtol=1e-9)
    close((v * g_v).detach(), expected["v"].unflatten(1, (2, 2)).sum(2), rtol=1e-9)


# --- one graph, several passes --------------------------------------------------------------------


@pytest.mark.parametrize("factors", [{}, {Pass.LRP: 0.25, Pass.CP_LRP: 0.0}])
def test_scale_gradient_reads_the_pass_while_backward_runs(
    generator: torch.Generator, factors: dict[Pass, float]
) -> None:
    x, switch = leaf(generator, 4), PassSwitch()
    y = rules.scale_gradient(x * 1.0, factors, switch)
    assert torch.equal(y, x)
    g = torch.randn(4, dtype=torch.float64, generator=generator)
    for running in [Pass.LRP, Pass.FISHER, Pass.CP_LRP, Pass.LRP]:
        (got,) = grads(y, [x], g, switch, running)
        assert torch.equal(got, g * factors.get(running, 1.0))


def test_route_returns_one_value_and_differentiates_the_other(generator: torch.Generator) -> None:
    x, switch = leaf(generator, 4), PassSwitch()
    y = rules.route(x.sin(), 3 * x, switch)
    assert torch.equal(y, x.sin())
    ones = torch.ones(4, dtype=torch.float64)
    close(grads(y, [x], ones, switch, Pass.FISHER)[0], x.detach().cos())
    for running in RULE_PASSES:
        close(grads(y, [x], ones, switch, running)[0], 3 * ones)


def test_switch_returns_to_the_former_pass_after_an_error() -> None:
    switch = PassSwitch()
    with switch.running(Pass.LRP):
        with pytest.raises(ZeroDivisionError):
            with switch.running(Pass.CP_LRP):
                raise ZeroDivisionError
        assert switch.current is Pass.LRP
    assert switch.current is Pass.FISHER
