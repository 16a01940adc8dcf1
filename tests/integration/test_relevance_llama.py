"""The sweep over whole tiny models built with transformers: values, true gradients, conservation, scope."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lrpq.errors import ModelError, QuantizationError
from lrpq.relevance.attention import register_attention
from lrpq.relevance.attribute import BlockBackward, block_backward, relevance_sum
from lrpq.relevance.composite import apply_rules
from lrpq.relevance.head import IGNORED_LABEL, head_gradient, logit_seed, nll_seed, sequence_generator
from lrpq.relevance.rules import Pass, PassSwitch

N, T, VOCAB = 2, 11, 61
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=8),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=VOCAB, n_positions=64),
}
SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def build(family: str = "llama", dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    register_attention()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention).to(dtype).eval()
    with torch.no_grad():  # norms start as ones or zeros, biases as zeros: make every factor count
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def parts(model: Any) -> tuple[nn.ModuleList, nn.Module]:
    body = model.base_model
    return (body.h, body.ln_f) if hasattr(body, "h") else (body.layers, body.norm)


def sites(block: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    return {site: [(name, block.get_submodule(name)) for name in names] for site, names in SITES.items()}


TOKENS = torch.randint(VOCAB, (N, T), generator=torch.Generator().manual_seed(1))


@contextmanager
def patched(model: Any, switch: PassSwitch) -> Iterator[None]:
    blocks, norm = parts(model)
    with ExitStack() as stack:
        for module in [*blocks, norm]:
            stack.enter_context(apply_rules(module, switch))
        yield


def captured(model: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """Input and call arguments of every block, then the last block's output, as a streaming forward would."""
    blocks, norm = parts(model)
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    hooks = [
        b.register_forward_pre_hook(lambda _, a, k: calls.append((a[0], dict(k))), with_kwargs=True) for b in blocks
    ]
    hooks.append(norm.register_forward_pre_hook(lambda _, a: calls.append((a[0], {}))))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def sweep(model: Any, passes: tuple[Pass, ...], **head: Any) -> tuple[list[dict[Pass, Tensor]], list[BlockBackward]]:
    """Gradients at every block's input and at the last output (in this order), and every block's result."""
    switch = PassSwitch()
    blocks, norm = parts(model)
    *inputs, (last, _) = captured(model)
    gradients, _ = head_gradient(norm, model.lm_head, last, switch=switch, passes=passes, **head)
    kept, results = [gradients], []
    for block, (hidden, call_args) in zip(reversed(blocks), reversed(inputs), strict=True):
        results.append(block_backward(block, call_args, hidden, kept[-1], sites(block), switch=switch))
        kept.append(dict(results[-1].gradients))
    return kept[::-1], results[::-1]


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager", "lrpq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_patched_logits_are_the_original_ones_bit_for_bit(family: str, dtype: torch.dtype, attention: str) -> None:
    model = build(family, dtype, attention)
    reference = build(family, dtype, "sdpa" if attention == "lrpq" else attention)
    with torch.no_grad():
        expected = reference(TOKENS, use_cache=False).logits
        assert torch.equal(model(TOKENS, use_cache=False).logits, expected)
    for running in Pass:
        switch = PassSwitch(current=running)
        with patched(model, switch):
            assert torch.equal(model(TOKENS, use_cache=False).logits, expected)  # with a graph
            with torch.no_grad():
                assert torch.equal(model(TOKENS, use_cache=False).logits, expected)


def test_registered_attention_keeps_the_sliding_window() -> None:
    windowed, full = build("mistral", attention="lrpq"), build("mistral", attention="lrpq")
    full.config.sliding_window = None
    with torch.no_grad():
        assert not torch.allclose(windowed(TOKENS).logits, full(TOKENS).logits)
        assert torch.equal(windowed(TOKENS).logits, build("mistral", attention="sdpa")(TOKENS).logits)


# --- the true gradient ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_fisher_pass_of_a_patched_block_is_plain_autograd_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model, switch = build(family, dtype), PassSwitch()
    for block, (hidden, call_args) in zip(parts(model)[0], captured(model)[:-1], strict=True):
        g = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(dtype)

        def run(block: nn.Module = block, hidden: Tensor = hidden, args: Any = call_args, g: Tensor = g) -> Tensor:
            leaf = hidden.clone().requires_grad_()
            output = block(leaf, **args)
            return torch.autograd.grad(output[0] if isinstance(output, tuple) else output, leaf, g)[0]

        expected = run()
        with apply_rules(block, switch):
            assert torch.equal(run(), expected)
            with switch.running(Pass.LRP):
                assert not torch.allclose(run(), expected, rtol=1e-2)


@pytest.mark.usefixtures("float64_norms")
def test_sweep_gives_the_true_gradients_of_the_whole_model_and_their_squared_sums() -> None:
    model = build(dtype=torch.float64)
    labels = torch.randint(VOCAB, (N, T), generator=torch.Generator().manual_seed(4))
    labels[0, 3] = IGNORED_LABEL
    gradients, results = sweep(model, (Pass.FISHER, Pass.LRP), labels=labels)

    # the same from one ordinary forward and backward through the whole model
    seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def remember(key: tuple[int, str]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            seen[key] = (args[0], output)

        return hook

    blocks, _ = parts(model)
    for i, block in enumerate(blocks):
        for name in ("input_layernorm", *(name for names in SITES.values() for name in names)):
            block.get_submodule(name).register_forward_hook(remember((i, name)))
    logits = model(TOKENS, use_cache=False).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    for i, result in enumerate(results):
        (expected,) = torch.autograd.grad(loss, seen[i, "input_layernorm"][0], retain_graph=True)
        torch.testing.assert_close(gradients[i][Pass.FISHER], expected, rtol=1e-10, atol=1e-13)
        for site, names in SITES.items():
            for name in names:
                x, y = seen[i, name]
                (g,) = torch.autograd.grad(loss, y, retain_graph=True)
                squares = g.flatten(0, 1).square()
                module = result.modules[name]
                assert module.d_out == y.shape[-1]
                torch.testing.assert_close(module.token_sums[Pass.FISHER], squares.sum(1), rtol=1e-10, atol=1e-24)
                torch.testing.assert_close(module.channel_sums, squares.sum(0), rtol=1e-10, atol=1e-24)
                torch.testing.assert_close(result.inputs[site], x.flatten(0, 1).detach(), rtol=1e-10, atol=1e-13)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sums_are_wide_in_a_bf16_model() -> None:
    model = build(dtype=torch.bfloat16)
    gradients, results = sweep(
        model, (Pass.FISHER, Pass.LRP, Pass.CP_LRP), generators=[sequence_generator(0, i) for i in range(N)]
    )
    for result in results:
        assert {x.dtype for x in result.inputs.values()} == {torch.bfloat16}
        for name, module in result.modules.items():
            assert module.channel_sums.dtype == torch.float64
            assert {s.dtype for s in module.token_sums.values()} == {torch.float32}
            constant = name.endswith(("q_proj", "k_proj", "gate_proj"))
            for running, sums in module.token_sums.items():
                assert sums.shape == (N * T,)
                assert bool(sums.any()) != (running is Pass.CP_LRP and constant)
            torch.testing.assert_close(
                module.channel_sums.sum(), module.token_sums[Pass.FISHER].double().sum(), rtol=1e-5, atol=0
            )
    assert all(g.dtype == torch.bfloat16 for g in gradients[0].values())


# --- at the head ----------------------------------------------------------------------------------


def test_head_gradient_is_that_of_the_cross_entropy_whatever_the_chunk() -> None:
    model, switch = build(), PassSwitch()
    norm, (last, _) = parts(model)[1], captured(model)[-1]
    labels = torch.randint(VOCAB, (N, T), generator=torch.Generator().manual_seed(4))
    labels[1, -2:] = IGNORED_LABEL
    leaf = last.clone().requires_grad_()
    loss = functional.cross_entropy(model.lm_head(norm(leaf)).flatten(0, 1), labels.flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(loss, leaf)
    for chunk in (1, 4, T, 100):
        gradients, nats = head_gradient(
            norm, model.lm_head, last, switch=switch, passes=[Pass.FISHER], labels=labels, chunk_tokens=chunk
        )
        torch.testing.assert_close(gradients[Pass.FISHER], expected, rtol=1e-4, atol=1e-6)
        assert nats == pytest.approx(loss.item(), rel=1e-6)


def test_sampled_labels_belong_to_the_sequence_not_to_its_batch_or_chunk() -> None:
    model, switch = build(), PassSwitch()
    norm, (last, _) = parts(model)[1], captured(model)[-1]
    used: list[Tensor] = []

    def seed(logits: Tensor, labels: Tensor) -> Tensor:
        used.append(labels)
        return nll_seed(logits, labels)

    def labels_of(hidden: Tensor, indices: list[int], chunk: int) -> Tensor:
        used.clear()
        generators = [sequence_generator(5, i) for i in indices]
        options: dict[str, Any] = {"generators": generators, "seed": seed, "chunk_tokens": chunk}
        head_gradient(norm, model.lm_head, hidden, switch=switch, passes=[Pass.FISHER], **options)
        return torch.cat(used).view(len(indices), T)

    together = labels_of(last, [8, 9], 4)
    assert torch.equal(labels_of(last[1:], [9], T)[0], together[1])
    assert not torch.equal(labels_of(last[1:], [8], T)[0], together[1])


# --- conservation ---------------------------------------------------------------------------------

ONE_LOGIT = torch.full((N, T), IGNORED_LABEL)
ONE_LOGIT[1, -1] = 17
SEEDS = {"one logit": ONE_LOGIT, "a logit a token": TOKENS.roll(-1, 1)}


def seeded(model: Any, labels: Tensor) -> Tensor:
    """Sum of the seeded logits, from the model's own forward."""
    with torch.no_grad():
        logits = model(TOKENS, use_cache=False).logits
    return logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[labels >= 0].sum()


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers normalises in float32 whatever comes in; a reference in float64 needs PyTorch's own."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def logit_sweep(labels: Tensor) -> tuple[Tensor, list[Tensor], list[dict[Pass, Tensor]]]:
    """Seeded logit; hidden states and gradients of all passes at every block input and the last output."""
    model = build(dtype=torch.float64)
    gradients, _ = sweep(model, tuple(Pass), labels=labels, seed=logit_seed)
    return seeded(model, labels), [hidden for hidden, _ in captured(model)], gradients


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("seed", list(SEEDS))
def test_cp_lrp_conserves_the_logit_at_every_block_and_plain_gradients_do_not(seed: str) -> None:
    logit, hidden, gradients = logit_sweep(SEEDS[seed])
    assert len(hidden) == SHAPE["num_hidden_layers"] + 1
    for h, g in zip(hidden, gradients, strict=True):
        torch.testing.assert_close(relevance_sum(h, g[Pass.CP_LRP]).sum(), logit, rtol=1e-9, atol=0)
        # six orders of magnitude outside the tolerance: the test would not pass without the rules
        assert (relevance_sum(h, g[Pass.FISHER]).sum() - logit).abs() > 1e-3 * logit.abs()


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("seed", list(SEEDS))
def test_lrp_conserves_the_logit_but_for_the_softmax_residuals(seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """R(block input) = R(block output) - residual, the residual written out from q, k, v and the gradient."""
    calls: list[dict[str, Any]] = []
    kernel = functional.scaled_dot_product_attention

    def recorder(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out: Tensor = kernel(q, k, v, **options)
        if out.requires_grad:
            call: dict[str, Any] = {"q": q, "k": k, "v": v, "scale": options["scale"], "g": []}
            out.register_hook(lambda g: call["g"].append(g))
            calls.append(call)
        return out

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recorder)
    logit, hidden, gradients = logit_sweep(SEEDS[seed])
    assert len(calls) == len(hidden) - 1
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    residuals = []
    for call in reversed(calls):  # first block first
        q = call["q"].detach()
        k, v = (call[x].detach().repeat_interleave(2, dim=1) for x in "kv")
        g = call["g"][list(Pass).index(Pass.LRP)]
        scores = q @ k.transpose(-1, -2) * call["scale"]
        pattern = torch.softmax(scores.masked_fill(~causal, -torch.inf), -1)
        r_pattern = pattern * ((g / 2) @ v.transpose(-1, -2))
        r_scores = scores * (r_pattern - pattern * r_pattern.sum(-1, keepdim=True))
        residuals.append(r_pattern.sum() - r_scores.sum())
    relevance = [relevance_sum(h, g[Pass.LRP]).sum() for h, g in zip(hidden, gradients, strict=True)]
    torch.testing.assert_close(relevance[-1], logit, rtol=1e-9, atol=0)
    for i, residual in enumerate(residuals):
        # the stabiliser of the gates takes about 1e-9 / |z| of the relevance
        torch.testing.assert_close(relevance[i] + residual, relevance[i + 1], rtol=1e-6, atol=1e-9)
        assert residual.abs() > 1e-4 * relevance[i + 1].abs()


@pytest.mark.usefixtures("float64_norms")
def test_relevance_passes_differ_from_the_gradient_and_from_each_other() -> None:
    _, _, gradients = logit_sweep(ONE_LOGIT)
    first = gradients[0]
    for a, b in [(Pass.FISHER, Pass.LRP), (Pass.FISHER, Pass.CP_LRP), (Pass.LRP, Pass.CP_LRP)]:
        assert (first[a] - first[b]).norm() > 0.05 * first[a].norm()


# --- one graph, several passes --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_graph_for_all_passes_gives_what_a_graph_for_each_gives(dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    labels = TOKENS.roll(-1, 1)
    together, results = sweep(model, (Pass.LRP, Pass.FISHER, Pass.CP_LRP), labels=labels)
    for running in (Pass.LRP, Pass.CP_LRP):
        apart, single = sweep(model, (Pass.FISHER, running), labels=labels)
        for a, b in zip(together, apart, strict=True):
            assert torch.equal(a[running], b[running])
            assert torch.equal(a[Pass.FISHER], b[Pass.FISHER])
        for a_result, b_result in zip(results, single, strict=True):
            for name, module in b_result.modules.items():
                assert torch.equal(a_result.modules[name].token_sums[running], module.token_sums[running])
                assert torch.equal(a_result.modules[name].channel_sums, module.channel_sums)


# --- scope ----------------------------------------------------------------------------------------


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


def same(a: Mapping[str, dict[str, Any]], b: Mapping[str, dict[str, Any]]) -> bool:
    return a.keys() == b.keys() and all(a[m].keys() == b[m].keys() and all(a[m][k] is b[m][k] for k in a[m]) for m in a)


def test_scope_patches_one_block_and_restores_it_even_after_an_error() -> None:
    model, switch = build(), PassSwitch()
    blocks, _ = parts(model)
    before, others = attributes(model), [attributes(b) for b in blocks[1:]]

    def fail_inside() -> None:
        with apply_rules(blocks[0], switch):
            assert not same(attributes(model), before)
            assert all(same(attributes(b), o) for b, o in zip(blocks[1:], others, strict=True))
            assert blocks[1].self_attn.config._attn_implementation == "sdpa"
            with apply_rules(blocks[0], switch):  # again, same switch: nothing to do, nothing to undo
                pass
            assert "forward" in blocks[0].mlp.__dict__
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert same(attributes(model), before)
    assert model.config._attn_implementation == "sdpa"


def test_block_backward_leaves_no_hook_and_no_patch_behind() -> None:
    model = build()
    before = attributes(model)
    sweep(model, (Pass.FISHER, Pass.LRP), labels=TOKENS)
    assert same(attributes(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_operation_without_a_rule_is_refused_by_name_but_has_its_fisher() -> None:
    class UnknownNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumprod(dim=-1)

    model, switch = build(), PassSwitch()
    block = parts(model)[0][0]
    hidden, call_args = captured(model)[0]
    block.input_layernorm = UnknownNorm()
    before = attributes(block)
    g = torch.ones_like(hidden)
    with pytest.raises(ModelError, match=r"cumprod in module input_layernorm of class UnknownNorm: no relevance rule"):
        block_backward(block, call_args, hidden, {Pass.FISHER: g, Pass.LRP: g}, sites(block), switch=switch)
    assert same(attributes(block), before)
    result = block_backward(block, call_args, hidden, {Pass.FISHER: g}, sites(block), switch=switch)
    assert result.gradients[Pass.FISHER].isfinite().all()


def test_conflicting_patches_are_refused() -> None:
    block = parts(build())[0][0]
    with apply_rules(block, PassSwitch()):
        with pytest.raises(ModelError, match="another switch"):
            with apply_rules(block, PassSwitch()):
                pass
    block.mlp.forward = block.mlp.forward
    with pytest.raises(ModelError, match=r"forward of module mlp .*already replaced"):
        with apply_rules(block, PassSwitch()):
            pass


def test_block_backward_refuses_what_it_cannot_do_right() -> None:
    model, switch = build(), PassSwitch()
    block = parts(model)[0][0]
    hidden, call_args = captured(model)[0]
    g = {Pass.FISHER: torch.ones_like(hidden)}

    def run(upstream: Any = g, where: Any = None, **more: Any) -> None:
        where = sites(block) if where is None else where
        block_backward(block, {**call_args, **more}, hidden, upstream, where, switch=switch)

    with pytest.raises(QuantizationError, match="fisher"):
        run({Pass.LRP: g[Pass.FISHER]})
    with pytest.raises(QuantizationError, match="cache"):
        run(past_key_values=object())
    with pytest.raises(QuantizationError, match=r"o_proj ran twice or reads another tensor"):
        run(where={"qkv": [("q_proj", block.self_attn.q_proj), ("o_proj", block.self_attn.o_proj)]})
    with pytest.raises(QuantizationError, match="stranger did not run"):
        run(where={**sites(block), "other": [("stranger", nn.Linear(2, 2))]})
    with pytest.raises(QuantizationError, match=r"the gradient of the fisher pass is not finite"):
        run({Pass.FISHER: g[Pass.FISHER] * torch.inf})
    block.train()
    with pytest.raises(QuantizationError, match="training mode"):
        run()


def test_head_gradient_refuses_labels_that_do_not_fit() -> None:
    model = build()
    norm, (last, _) = parts(model)[1], captured(model)[-1]
    options: dict[str, Any] = {"switch": PassSwitch(), "passes": [Pass.FISHER]}
    for labels in ({}, {"labels": TOKENS, "generators": []}):
        with pytest.raises(QuantizationError, match="exactly one"):
            head_gradient(norm, model.lm_head, last, **options, **labels)
    for labels in ({"labels": TOKENS[:1]}, {"generators": [sequence_generator(0, 0)]}):
        with pytest.raises(QuantizationError, match=rf"{N} x {T} tokens"):
            head_gradient(norm, model.lm_head, last, **options, **labels)
