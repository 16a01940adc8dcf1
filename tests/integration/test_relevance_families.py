"""The rule table for every architecture, on tiny models of transformers' own classes.

Each case: values and the true gradient bit for bit, conservation with every residual written out, no idle row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from lrpq.errors import ModelError
from lrpq.model.experts import replace_experts
from lrpq.relevance import attention
from lrpq.relevance.attribute import relevance_sum
from lrpq.relevance.composite import COMPOSITE, Rule, apply_rules, linear
from lrpq.relevance.rules import Pass, PassSwitch

N, T, VOCAB, WINDOW = 2, 11, 61, 4
TOKENS = torch.randint(VOCAB, (N, T), generator=torch.Generator().manual_seed(1))
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
LLAMA_LIKE = SIZE | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": WINDOW}
LLAMA_LIKE |= {"max_position_embeddings": 64, "pad_token_id": 0, "tie_word_embeddings": False}
QWEN3_MOE = LLAMA_LIKE | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
BOTH_KINDS = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Case:
    config: Callable[..., Any]
    options: dict[str, Any]
    attentions: tuple[str, ...] = ("sdpa", "eager", "lrpq")
    silent: dict[str, Any] = field(default_factory=lambda: {"sliding_window": 2 * T})
    """Options that switch off what a wrong patch would lose without an error."""


CASES = {
    "qwen3": Case(Qwen3Config, LLAMA_LIKE | {"use_sliding_window": True, "layer_types": BOTH_KINDS}),
    "gemma2": Case(Gemma2Config, LLAMA_LIKE | {"attn_logit_softcapping": None}),
    "gemma2, soft cap": Case(
        Gemma2Config, LLAMA_LIKE | {"attn_logit_softcapping": 0.3}, ("eager",), {"attn_logit_softcapping": None}
    ),
    "gemma3": Case(Gemma3TextConfig, LLAMA_LIKE | {"layer_types": BOTH_KINDS}),
    "phi3": Case(Phi3Config, LLAMA_LIKE),
    "opt": Case(OPTConfig, SIZE | {"ffn_dim": 48}, silent={}),
    "opt, norms last": Case(OPTConfig, SIZE | {"ffn_dim": 48, "do_layer_norm_before": False}, silent={}),
    "neox": Case(GPTNeoXConfig, SIZE | {"intermediate_size": 48, "hidden_act": "gelu_fast"}, silent={}),
    "neox, in series": Case(GPTNeoXConfig, SIZE | {"intermediate_size": 48, "use_parallel_residual": False}, silent={}),
    "mixtral": Case(MixtralConfig, LLAMA_LIKE | {"num_local_experts": 4}),
    "qwen3 moe": Case(Qwen3MoeConfig, QWEN3_MOE | {"use_sliding_window": True, "norm_topk_prob": True}),
    "qwen3 moe, dense block": Case(Qwen3MoeConfig, QWEN3_MOE | {"use_sliding_window": True, "mlp_only_layers": [1]}),
}
# `attn_implementation="sdpa"` is refused for Gemma 2 by transformers even without a soft cap: set after building
CASES_AND_ATTENTIONS = [(name, kind) for name, case in CASES.items() for kind in case.attentions]
in_every_family = pytest.mark.parametrize("name", list(CASES))
with_every_attention = pytest.mark.parametrize(("name", "kind"), CASES_AND_ATTENTIONS)


def build(
    name: str,
    dtype: torch.dtype = torch.float32,
    kind: str | None = None,
    *,
    linear_experts: bool = True,
    **options: Any,
) -> Any:
    attention.register_attention()
    case = CASES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.config(**case.options | options), attn_implementation="eager")
    model.config._attn_implementation = kind or case.attentions[0]
    model = model.to(dtype).eval()
    with torch.no_grad():  # norms start as ones or zeros, biases as zeros: make every factor count
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.config._experts_implementation = "eager"
    if linear_experts:
        make_experts_linear(model)
    return model


def make_experts_linear(model: Any) -> None:
    for index, block in enumerate(parts(model)[0]):
        fused: Any = dict(block.named_modules()).get("mlp.experts")
        experts = replace_experts(block, "mlp.experts", name=f"layers.{index}")
        if experts is None:
            continue
        gate_up = {f"{e}.gate_up_proj.weight": w for e, w in enumerate(fused.gate_up_proj.detach())}
        down = {f"{e}.down_proj.weight": w for e, w in enumerate(fused.down_proj.detach())}
        experts.load_state_dict(gate_up | down, assign=True)


def parts(model: Any) -> tuple[nn.ModuleList, list[nn.Module]]:
    """Blocks, and the final norm where there is one (OPT with its norms last has none)."""
    body = getattr(model.base_model, "decoder", model.base_model)
    norms = [getattr(body, name, None) for name in ("norm", "ln_f", "final_layer_norm")]
    return (body.h if hasattr(body, "h") else body.layers), [norm for norm in norms if norm is not None]


def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS, use_cache=False).logits
    return found


@contextmanager
def patched(model: Any, switch: PassSwitch) -> Iterator[None]:
    blocks, norms = parts(model)
    with ExitStack() as stack:
        for module in [*blocks, *norms]:
            stack.enter_context(apply_rules(module, switch))
        yield


def captured(model: Any) -> list[tuple[nn.Module, Tensor, dict[str, Any]]]:
    """Every block with its input and call arguments, as a streaming forward would record them."""
    calls: list[tuple[nn.Module, Tensor, dict[str, Any]]] = []
    hooks = [
        block.register_forward_pre_hook(lambda m, a, k: calls.append((m, a[0].detach(), dict(k))), with_kwargs=True)
        for block in parts(model)[0]
    ]
    with torch.no_grad():
        logits(model)
    for hook in hooks:
        hook.remove()
    return calls


def upstream(hidden: Tensor) -> Tensor:
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden.dtype)


def gradient(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    leaf = hidden.clone().requires_grad_()
    return torch.autograd.grad(block(leaf, **arguments), leaf, upstream(hidden))[0]


def lrp_gradient(block: nn.Module, hidden: Tensor, arguments: dict[str, Any], table: Mapping[Any, Rule]) -> Tensor:
    with apply_rules(block, PassSwitch(current=Pass.LRP), table):
        return gradient(block, hidden, arguments)


# --- values and the true gradient -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@with_every_attention
def test_patched_logits_are_the_original_ones_bit_for_bit(name: str, kind: str, dtype: torch.dtype) -> None:
    with torch.no_grad():
        expected = logits(build(name, dtype, "sdpa" if kind == "lrpq" else kind, linear_experts=False))
    model = build(name, dtype, kind)
    for running in Pass:
        with patched(model, PassSwitch(current=running)):
            assert torch.equal(logits(model), expected)  # with a graph
            with torch.no_grad():
                assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.silent])
def test_windows_and_soft_caps_show_in_the_logits(name: str) -> None:
    """Without this the test above could pass with the window or the soft cap lost on both sides."""
    assert T > WINDOW
    with torch.no_grad():
        assert not torch.allclose(logits(build(name)), logits(build(name, **CASES[name].silent)), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@with_every_attention
def test_fisher_pass_is_plain_autograd_bit_for_bit_and_lrp_is_not(name: str, kind: str, dtype: torch.dtype) -> None:
    switch = PassSwitch()
    for block, hidden, arguments in captured(build(name, dtype, kind)):
        expected = gradient(block, hidden, arguments)
        with apply_rules(block, switch):
            assert torch.equal(gradient(block, hidden, arguments), expected)
            for running in (Pass.LRP, Pass.CP_LRP):
                with switch.running(running):
                    difference = gradient(block, hidden, arguments) - expected
                assert difference.norm() > 0.02 * expected.norm()


@in_every_family
def test_no_row_of_the_table_is_idle(name: str) -> None:
    """With the rule of any one class left out the LRP gradient is another one."""
    model, acting = build(name), set()
    for block, hidden, arguments in captured(model):
        complete = lrp_gradient(block, hidden, arguments, COMPOSITE)
        for kind in {type(module) for module in block.modules()}:
            module = next(m for m in block.modules() if type(m) is kind)
            if not COMPOSITE[kind](module, PassSwitch()) or kind is nn.ReLU:  # relu's derivative is its y/z
                continue
            acting.add(kind)
            without = lrp_gradient(block, hidden, arguments, {**COMPOSITE, kind: linear})
            assert (without - complete).norm() > 1e-3 * complete.norm(), kind
    assert len(acting) >= 2


# --- conservation ---------------------------------------------------------------------------------


@dataclass
class Residuals:
    """What the rules knowingly do not pass on, by source, recorded while a block runs forward and backward."""

    biases: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    routing: list[Tensor] = field(default_factory=list)

    def total(self) -> Tensor:
        return sum([*self.biases, *self.attention, *self.routing], torch.zeros((), dtype=torch.float64))


def bias_hook(found: Residuals) -> Callable[..., None]:
    """Of y = f(x) + b the bias keeps b * gradient."""

    def hook(module: Any, _: Any, output: Tensor) -> None:
        def keep(g: Tensor | None) -> None:
            if g is not None:  # the running pass holds the layer constant
                found.biases.append((module.bias * g).sum())

        output.register_hook(keep)

    return hook


def recording_kernel(found: Residuals, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Half of the attention's relevance goes to the scores; softmax and soft cap keep a part of it.

    Written out: softmax R = x (R_A - s sum R_A), soft cap R = x (1 - tanh^2) R_c / c.
    """

    def run(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        output, weights = kernel(module, q, k, v, mask, **options)
        scores = q.detach() @ k.detach().repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2)
        scores = scores * options["scaling"]
        cap = options.get("softcap")
        shrunk = scores if cap is None else cap * torch.tanh(scores / cap)
        slope = torch.ones_like(scores) if cap is None else 1 - torch.tanh(scores / cap).square()
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool).tril()
        masked = shrunk.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else shrunk + mask
        pattern = torch.softmax(masked, dim=-1)

        def keep(g: Tensor) -> None:
            wide_v = v.detach().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            r_pattern = pattern * ((g.transpose(1, 2) / 2) @ wide_v.transpose(-1, -2))
            r_scores = scores * slope * (r_pattern - pattern * r_pattern.sum(-1, keepdim=True))
            found.attention.append(r_pattern.sum() - r_scores.sum())

        output.register_hook(keep)
        return output, weights

    return run


def routing_hook(found: Residuals) -> Callable[..., None]:
    """The router's softmax over experts, and the normalisation of the chosen ones, keep what they do not pass on."""

    def hook(module: Any, args: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, weights, index = output
        z = (args[0].detach().reshape(-1, module.hidden_dim) @ module.weight.detach().T).requires_grad_()

        def keep(g: Tensor | None) -> None:
            if g is None:  # under CP_LRP the router is a constant
                return
            with torch.enable_grad():
                chosen = torch.softmax(z, dim=-1).gather(-1, index)
                if getattr(module, "norm_topk_prob", True):
                    chosen = chosen / chosen.sum(-1, keepdim=True)
                (g_z,) = torch.autograd.grad(chosen, z, g.to(chosen.dtype))
            found.routing.append((chosen.detach() * g).sum() - (z.detach() * g_z).sum())

        weights.register_hook(keep)

    return hook


def relevance_balance(
    call: tuple[nn.Module, Tensor, dict[str, Any]], running: Pass, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor, Residuals]:
    """Relevance at one block's input and output, and the residuals between them."""
    block, hidden, arguments = call
    found, switch, original = Residuals(), PassSwitch(current=running), attention._kernel
    hooks = [
        *(m.register_forward_hook(bias_hook(found)) for m in block.modules() if getattr(m, "bias", None) is not None),
        *(
            m.register_forward_hook(routing_hook(found))
            for m in block.modules()
            if isinstance(m, MixtralTopKRouter | Qwen3MoeTopKRouter)
        ),
    ]
    with monkeypatch.context() as patch:
        if running is Pass.LRP:
            patch.setattr(attention, "_kernel", lambda m, name: recording_kernel(found, original(m, name)))
        with apply_rules(block, switch):
            leaf = hidden.clone().requires_grad_()
            output = block(leaf, **arguments)
            (g,) = torch.autograd.grad(output, leaf, upstream(hidden))
    for hook in hooks:
        hook.remove()
    return relevance_sum(hidden, g).sum(), relevance_sum(output.detach(), upstream(hidden)).sum(), found


# An activation outside a gate passes y z / (z + 1e-9): the stabiliser keeps 1e-9 / |z| of it
UNGATED = ("opt", "neox")
# softmaxes that transformers computes in float32 whatever the dtype: the eager kernel's and the routers'
FLOAT32_SOFTMAX = ("gemma2, soft cap", "mixtral", "qwen3 moe")


@in_every_family
def test_cp_lrp_conserves_relevance_in_every_block_but_for_biases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, torch.float64)
    for call in captured(model):
        relevance_in, relevance_out, found = relevance_balance(call, Pass.CP_LRP, monkeypatch)
        assert not found.routing  # the router is a constant
        assert bool(found.biases) == any(p.endswith("bias") for p, _ in call[0].named_parameters())
        rtol = 1e-6 if name.startswith(UNGATED) else 1e-11
        torch.testing.assert_close(relevance_in + found.total(), relevance_out, rtol=rtol, atol=0)
        if found.biases:  # far outside the tolerance: their residual is really there
            assert found.total().abs() > 1e-3 * relevance_out.abs()
        # the plain gradient is far from conserving: the rules are what makes it so
        block, hidden, arguments = call
        plain = relevance_sum(hidden, gradient(block, hidden, arguments)).sum()
        assert (plain + found.total() - relevance_out).abs() > 1e-3 * relevance_out.abs()


@in_every_family
def test_lrp_conserves_relevance_but_for_the_residuals_written_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, torch.float64)
    for call in captured(model):
        relevance_in, relevance_out, found = relevance_balance(call, Pass.LRP, monkeypatch)
        has_router = any(isinstance(m, MixtralTopKRouter | Qwen3MoeTopKRouter) for m in call[0].modules())
        assert (len(found.attention), len(found.routing)) == (1, int(has_router))
        atol = 1e-5 if name.startswith(FLOAT32_SOFTMAX) else 1e-9
        torch.testing.assert_close(relevance_in + found.total(), relevance_out, rtol=1e-6, atol=atol)
        for residual in (*found.attention, *found.routing):
            assert residual.abs() > 1e-4 * relevance_out.abs()


# --- scope ----------------------------------------------------------------------------------------


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(module.__dict__) for module in model.modules()]


@in_every_family
def test_nothing_stays_patched_and_an_unknown_class_is_refused_by_name(name: str) -> None:
    class UnknownNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean()

    model = build(name)
    before = attributes(model)

    def restored() -> bool:
        after = attributes(model)
        return all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(before, after, strict=True))

    with patched(model, PassSwitch()):
        assert not restored()
    assert restored()
    block = parts(model)[0][1]
    norm = next(n for n, _ in block.named_children() if "norm" in n or n.startswith("ln"))
    setattr(block, norm, UnknownNorm())
    before = attributes(model)
    with pytest.raises(ModelError, match=rf"module {norm} of class UnknownNorm has no relevance rule"):
        with patched(model, PassSwitch()):
            pass
    assert restored()


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_experts_that_are_not_linear_layers_are_refused_by_name(name: str) -> None:
    model = build(name, linear_experts=False)
    with pytest.raises(ModelError, match=r"module mlp\.experts of class (Mixtral|Qwen3Moe)Experts has no relevance"):
        with patched(model, PassSwitch()):
            pass


def test_eager_gpt2_that_bypasses_the_attention_function_is_refused() -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=VOCAB, reorder_and_upcast_attn=True)
    block = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().transformer.h[0]
    with pytest.raises(ModelError, match="GPT2Attention has reorder_and_upcast_attn"):
        with apply_rules(block, PassSwitch()):
            pass


def test_a_projection_behind_the_final_norm_follows_the_rules_as_a_sequence() -> None:
    """OPT with narrow embeddings; also the sequence of nothing, where neither norm nor projection exist."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, 6, dtype=torch.float64, generator=generator).requires_grad_()
    tail = nn.Sequential(nn.LayerNorm(6, bias=False), nn.Linear(6, 4, bias=False)).double()
    g = torch.randn(T, 4, dtype=torch.float64, generator=generator)
    expected = tail(x)
    switch = PassSwitch(current=Pass.LRP)
    with apply_rules(tail, switch), apply_rules(nn.Sequential(), switch):
        y = tail(x)
    assert torch.equal(y, expected)
    (by_rules,), (plain,) = torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g)
    torch.testing.assert_close((x * by_rules).sum(), (y * g).sum(), rtol=1e-12, atol=0)
    assert (x * plain).sum().abs() < 1e-3 * (y * g).sum().abs()
