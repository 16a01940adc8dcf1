"""Rules per operation: the table of modules again, a matrix form, every row of the table of operations, refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config
from transformers.activations import LaplaceActivation, NewGELUActivation
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from lrpq.errors import ModelError
from lrpq.relevance import operations, rules
from lrpq.relevance.attribute import block_backward, relevance_sum
from lrpq.relevance.composite import apply_rules
from lrpq.relevance.head import head_gradient, sequence_generator
from lrpq.relevance.operations import OPERATIONS, operation_rules
from lrpq.relevance.passes import has_rule_table, rules_for
from lrpq.relevance.rules import Pass, PassSwitch

N, T, VOCAB = 2, 11, 61
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=8),
    "gpt2": lambda: GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
}
SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
TOKENS = torch.randint(VOCAB, (N, T), generator=torch.Generator().manual_seed(1))
RULE_PASSES = (Pass.LRP, Pass.CP_LRP)
Scope = Callable[[nn.Module, PassSwitch], AbstractContextManager[None]]
Call = tuple[nn.Module, Tensor, dict[str, Any]]


def no_rules(module: nn.Module, switch: PassSwitch) -> AbstractContextManager[None]:
    return nullcontext()


def build(family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention).to(dtype).eval()
    with torch.no_grad():  # norms start as ones or zeros, biases as zeros: make every factor count
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def parts(model: Any) -> tuple[nn.ModuleList, nn.Module]:
    body = model.base_model
    return (body.h, body.ln_f) if hasattr(body, "h") else (body.layers, body.norm)


def captured(model: Any) -> list[Call]:
    """Every block and the final norm, with input and call arguments."""
    blocks, norm = parts(model)
    calls: list[Call] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, a, k: calls.append((m, a[0].detach(), dict(k))), with_kwargs=True)
        for m in [*blocks, norm]
    ]
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def run(module: nn.Module, inputs: Mapping[str, Tensor] | Tensor, scope: Scope, **arguments: Any) -> Any:
    """Output, and per pass the gradients at the inputs, zeros where there is none; one graph for all passes."""
    switch = PassSwitch()
    given = {"x": inputs} if isinstance(inputs, Tensor) else inputs
    leaves = [x.clone().requires_grad_() for x in given.values()]
    with scope(module, switch):
        y = module(*leaves, **arguments)
    g = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    gradients: dict[Pass, list[Tensor]] = {}
    for running in Pass:
        with switch.running(running):
            found = torch.autograd.grad(y, leaves, g, retain_graph=True, allow_unused=True)
        gradients[running] = [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, found, strict=True)]
    return y.detach(), gradients, g


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- the table of modules, found again ------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_blocks_and_norms_agree_with_the_table_of_modules(family: str, dtype: torch.dtype, attention: str) -> None:
    for module, hidden, arguments in captured(build(family, dtype, attention)):
        plain, true, _ = run(module, hidden, no_rules, **arguments)
        values, found, _ = run(module, hidden, operation_rules, **arguments)
        _, table, _ = run(module, hidden, apply_rules, **arguments)
        assert torch.equal(values, plain)
        assert torch.equal(found[Pass.FISHER][0], true[Pass.FISHER][0])
        for running in RULE_PASSES:
            assert relative(found[running][0], table[running][0]) < 1e-5
            assert relative(found[running][0], true[Pass.FISHER][0]) > 0.02
        with torch.no_grad(), operation_rules(module, PassSwitch()):
            output = module(hidden, **arguments)
        assert torch.equal(output, plain)


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers normalises in float32 whatever comes in; these are the same norms without the casts."""

    def llama(self: Any, x: Tensor) -> Tensor:
        scaled: Tensor = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
        return scaled

    def gemma(self: Any, x: Tensor) -> Tensor:
        scaled: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)
        return scaled

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(norm, "forward", llama)
    monkeypatch.setattr(GemmaRMSNorm, "forward", gemma)


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("family", list(CONFIGS))
def test_blocks_agree_with_the_table_in_float64(family: str) -> None:
    for module, hidden, arguments in captured(build(family, torch.float64)):
        values, found, _ = run(module, hidden, operation_rules, **arguments)
        plain, table, _ = run(module, hidden, apply_rules, **arguments)
        assert relative(values, plain) < 1e-12
        for running in Pass:
            assert relative(found[running][0], table[running][0]) < 1e-10


# --- a class without a row, through the sweep -----------------------------------------------------


class OtherNorm(LlamaRMSNorm):  # type: ignore[misc]
    """No row: lookup is by the exact class."""


class OtherLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """No row either."""


def test_sweep_of_an_unknown_class_gives_what_the_table_gives_for_the_known_one() -> None:
    model = build("llama")
    block, hidden, arguments = captured(model)[0]
    sites = {site: [(name, block.get_submodule(name)) for name in names] for site, names in SITES.items()}
    upstream = dict.fromkeys(Pass, torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)))
    assert has_rule_table(block)
    expected = block_backward(block, arguments, hidden, upstream, sites, switch=PassSwitch())

    block.__class__, block.input_layernorm.__class__ = OtherLayer, OtherNorm
    assert not has_rule_table(block)
    before = {name: dict(m.__dict__) for name, m in block.named_modules()}
    found = block_backward(block, arguments, hidden, upstream, sites, switch=PassSwitch())
    assert {name: dict(m.__dict__) for name, m in block.named_modules()} == before
    assert torch.equal(found.gradients[Pass.FISHER], expected.gradients[Pass.FISHER])
    assert relative(expected.gradients[Pass.LRP], expected.gradients[Pass.FISHER]) > 0.1
    for running in Pass:
        assert relative(found.gradients[running], expected.gradients[running]) < 1e-5
        for name, stats in expected.modules.items():
            torch.testing.assert_close(
                found.modules[name].token_sums[running], stats.token_sums[running], rtol=1e-5, atol=1e-12
            )
    constant = {name for name, stats in found.modules.items() if not stats.token_sums[Pass.CP_LRP].any()}
    assert constant == {"self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"}
    for site, inputs in expected.inputs.items():
        assert torch.equal(found.inputs[site], inputs)


def test_head_with_an_unknown_norm_gives_what_the_table_gives_for_the_known_one() -> None:
    model = build("llama")
    norm, hidden, _ = captured(model)[-1]

    def gradients() -> dict[Pass, Tensor]:
        generators = [sequence_generator(0, i) for i in range(N)]
        return head_gradient(
            norm, model.lm_head, hidden, switch=PassSwitch(), passes=tuple(Pass), generators=generators
        )[0]

    expected = gradients()
    norm.__class__ = OtherNorm
    assert not has_rule_table(norm)
    found = gradients()
    for running in Pass:
        assert relative(found[running], expected[running]) < 1e-6
    assert relative(found[Pass.LRP], found[Pass.FISHER]) > 0.02


def test_fisher_alone_needs_no_rule_for_anything() -> None:
    module = Function(lambda x: x.cumprod(-1))
    assert not has_rule_table(module)
    leaf = torch.randn(3, 4).requires_grad_()
    with rules_for(module, PassSwitch(), [Pass.FISHER]):
        module(leaf)
    with pytest.raises(ModelError, match="cumprod"), rules_for(module, PassSwitch(), [Pass.FISHER, Pass.LRP]):
        module(leaf)


# --- against the rules written out as matrices ----------------------------------------------------


class GatedBlock(nn.Module):
    """x + D (act(G n) * (U n)), n = x / rms(x): a class that no table knows, twice."""

    def __init__(self, act: Callable[[Tensor], Tensor], swap: bool) -> None:
        super().__init__()
        self.act, self.swap = act, swap
        generator = torch.Generator().manual_seed(5)
        for name, shape in (("g", (7, 5)), ("u", (7, 5)), ("d", (5, 7))):
            for layer in "01":
                weight = torch.randn(shape, dtype=torch.float64, generator=generator) * 0.5
                self.register_parameter(name + layer, nn.Parameter(weight))

    def forward(self, x: Tensor) -> Tensor:
        for layer in "01":
            g, u, d = (self.get_parameter(name + layer) for name in "gud")
            n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            gate, value = self.act(n @ g.T), functional.linear(n, u)
            x = x + (value * gate if self.swap else gate * value) @ d.T
        return x


ALL_SILU: dict[str, Callable[[Tensor], Tensor]] = {
    "one operation": functional.silu,
    "module": nn.SiLU(),
    "z * sigmoid(z)": lambda z: z * torch.sigmoid(z),
    "sigmoid(2 z / 2) * z, with casts": lambda z: torch.sigmoid(2 * z.to(torch.float64) / 2) * z.clone(),
    "z / (1 + exp(-z))": lambda z: z / (1 + torch.exp(-z)),
}


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("act", list(ALL_SILU))
def test_two_gated_layers_follow_the_matrices_of_the_rules(act: str, swap: bool) -> None:
    block = GatedBlock(ALL_SILU[act], swap).eval()
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    y, found, g = run(block, x, operation_rules)
    assert torch.equal(y, block(x))

    for running in RULE_PASSES:
        for t in range(len(x)):
            # of one token: product over layers of 1 + D [gate_share diag(v slope) G + value_share diag(a) U] / rms
            jacobian, h = torch.eye(5, dtype=torch.float64), x[t]
            for layer in "01":
                g_w, u_w, d_w = (block.get_parameter(name + layer).detach() for name in "gud")
                rms = (h.square().mean() + 1e-6).sqrt()
                z, v = g_w @ h / rms, u_w @ h / rms
                a, slope = z * torch.sigmoid(z), torch.sigmoid(z)
                gate_share, value_share = (0.5, 0.5) if running is Pass.LRP else (0.0, 1.0)
                inner = gate_share * torch.diag(v * slope) @ g_w + value_share * torch.diag(a) @ u_w
                jacobian = (torch.eye(5, dtype=torch.float64) + d_w @ inner / rms) @ jacobian
                h = h + d_w @ (a * v)
            torch.testing.assert_close(found[running][0][t], jacobian.T @ g[t], rtol=1e-7, atol=1e-9)
        # no bias and no softmax: what the stabiliser takes apart, relevance is conserved
        torch.testing.assert_close(relevance_sum(x, found[running][0]), relevance_sum(y, g), rtol=1e-6, atol=1e-7)
    assert relative(found[Pass.LRP][0], found[Pass.FISHER][0]) > 0.05
    assert relative(found[Pass.LRP][0], found[Pass.CP_LRP][0]) > 0.05


# --- every row ------------------------------------------------------------------------------------


class Function(nn.Module):
    """A function as a module whose class has no row."""

    def __init__(self, function: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def changed(x: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    """A copy, changed in place."""
    x = 1.0 * x
    change(x)
    return x


INDEX = torch.tensor([2, 0, 2])
KEEP = torch.tensor([[True, False, True, True]] * 3)
FIXED = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
# x [3, 4] and y [3, 4] both depend on the input; every sample is linear (homogeneous, for maxima) in them together
LINEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "alias": lambda x, y: torch.ops.aten.alias.default(x),
    "broadcast_to": lambda x, y: x.broadcast_to(2, 3, 4),
    "cat": lambda x, y: torch.cat([x, y]),
    "chunk": lambda x, y: x.chunk(2, -1)[1],
    "concat": lambda x, y: torch.concat((x, y), -1),
    "cumsum": lambda x, y: x.cumsum(-1),
    "diagonal": lambda x, y: x.diagonal(),
    "expand": lambda x, y: x.expand(2, 3, 4),
    "expand_as": lambda x, y: x.expand_as(torch.ones(2, 3, 4)),
    "flatten": lambda x, y: x.flatten(),
    "flip": lambda x, y: x.flip(0),
    "gather": lambda x, y: x.gather(1, INDEX[:, None]),
    "getitem": lambda x, y: x[1:, :2],
    "index_add": lambda x, y: x.index_add(0, INDEX, y),
    "index_copy": lambda x, y: x.index_copy(0, INDEX[:2], y[:2]),
    "index_put": lambda x, y: x.index_put((INDEX[:2],), y[:2]),
    "index_select": lambda x, y: x.index_select(0, INDEX),
    "masked_scatter": lambda x, y: x.masked_scatter(KEEP, y),
    "masked_select": lambda x, y: x.masked_select(KEEP),
    "movedim": lambda x, y: x.movedim(0, 1),
    "mT": lambda x, y: x.mT,
    "narrow": lambda x, y: x.narrow(0, 1, 2),
    "pad": lambda x, y: functional.pad(x, (1, 2)),
    "permute": lambda x, y: x.permute(1, 0),
    "repeat": lambda x, y: x.repeat(2, 1),
    "repeat_interleave": lambda x, y: x.repeat_interleave(2, 0),
    "reshape": lambda x, y: x.reshape(4, 3),
    "reshape_as": lambda x, y: x.reshape_as(y.T),
    "roll": lambda x, y: x.roll(1, 0),
    "scatter": lambda x, y: x.scatter(0, INDEX[None], y[:1, :3]),
    "scatter_add": lambda x, y: x.scatter_add(0, INDEX[None], y[:1, :3]),
    "select": lambda x, y: x.select(0, 1),
    "setitem": lambda x, y: changed(x, lambda c: c.__setitem__(1, y[0])),
    "split": lambda x, y: x.split(2, -1)[0],  # type: ignore[no-untyped-call]
    "split_with_sizes": lambda x, y: x.split_with_sizes([1, 3], -1)[1],
    "squeeze": lambda x, y: x[:1].squeeze(0),
    "stack": lambda x, y: torch.stack([x, y]),
    "swapaxes": lambda x, y: x.swapaxes(0, 1),
    "t": lambda x, y: x.t(),
    "T": lambda x, y: x.T,
    "take_along_dim": lambda x, y: x.take_along_dim(INDEX[:, None], 1),
    "tensor_split": lambda x, y: x.tensor_split(2, 1)[0],
    "tile": lambda x, y: x.tile(2, 2),
    "topk": lambda x, y: x.topk(2).values,
    "transpose": lambda x, y: x.transpose(0, 1),
    "tril": lambda x, y: x.tril(),
    "triu": lambda x, y: x.triu(),
    "unbind": lambda x, y: x.unbind(0)[1],
    "unflatten": lambda x, y: x.unflatten(1, (2, 2)),  # type: ignore[no-untyped-call]
    "unfold": lambda x, y: x.unfold(1, 2, 1),
    "unsqueeze": lambda x, y: x.unsqueeze(0),
    "view": lambda x, y: x.view(12),
    "view_as": lambda x, y: x.view_as(torch.ones(2, 6)),
    "view_as_complex": lambda x, y: torch.view_as_real(torch.view_as_complex(x.view(6, 2)) * complex(0.6, 0.8)),
    "view_as_real": lambda x, y: torch.view_as_real(torch.view_as_complex(x.view(6, 2))),
    "add": lambda x, y: x + y,
    "bfloat16": lambda x, y: x.bfloat16().double(),
    "clone": lambda x, y: x.clone(),
    "contiguous": lambda x, y: x.T.contiguous(),
    "copy": lambda x, y: changed(x, lambda c: c.copy_(y)),
    "double": lambda x, y: x.float().double(),
    "fill": lambda x, y: torch.cat([changed(x, lambda c: c.fill_(0.0)), y]),
    "float": lambda x, y: x.float(),
    "half": lambda x, y: x.half().double(),
    "masked_fill": lambda x, y: x.masked_fill(KEEP, 0.0),
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, y),
    "neg": lambda x, y: -x,
    "negative": lambda x, y: x.negative(),
    "rsub": lambda x, y: 0.0 - x,
    "sub": lambda x, y: x - y,
    "subtract": lambda x, y: x.subtract(y),
    "to": lambda x, y: x.to(torch.float32),
    "type": lambda x, y: x.type(torch.float32),
    "type_as": lambda x, y: x.type_as(torch.ones(1)),
    "where": lambda x, y: torch.where(KEEP, x, y),
    "zero": lambda x, y: torch.cat([changed(x, lambda c: c.zero_()), y]),
    "amax": lambda x, y: x.amax(-1),
    "amin": lambda x, y: x.amin(-1),
    "max": lambda x, y: x.max(-1).values,
    "mean": lambda x, y: x.mean(-1),
    "min": lambda x, y: x.min(-1).values,
    "sum": lambda x, y: x.sum(-1),
}
IN_TORCH = "abs erf exp expm1 log log1p relu selu sqrt square tanh"
IN_FUNCTIONAL = "celu elu gelu hardswish hardtanh leaky_relu mish relu6 silu softplus softsign"
# from x, positive, to the result: identity rule
ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in IN_TORCH.split()},
    **{name: getattr(functional, name) for name in IN_FUNCTIONAL.split()},
    "log_sigmoid": functional.logsigmoid,
    "clamp": lambda x: x.clamp(0.5, 1.0),
    "clamp_max": lambda x: x.clamp_max(1.0),
    "clamp_min": lambda x: x.clamp_min(0.5),
    "clip": lambda x: x.clip(0.5, 1.0),
    "pow": lambda x: x**3,
    "rdiv": lambda x: 2.0 / x,
    "reciprocal": lambda x: x.reciprocal(),
    "rsqrt": lambda x: x.rsqrt(),
}
# a scale of x, which multiplies x: a constant
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "linalg_norm": lambda x: 1 / torch.linalg.norm(x, dim=-1, keepdim=True),
    "linalg_vector_norm": lambda x: 1 / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-6),
    "norm": lambda x: x.norm(dim=-1, keepdim=True),
    "std": lambda x: x.std(-1, keepdim=True),
    "var": lambda x: x.var(-1, keepdim=True),
    "rsqrt": lambda x: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "reciprocal": lambda x: (x.abs().sum(-1, keepdim=True) + 1).sqrt().reciprocal(),
    "rdiv": lambda x: 2.0 / (x.amax(-1, keepdim=True) + 1),
    "pow": lambda x: (x.square().sum(-1, keepdim=True) + 1e-6).pow(-0.5),
}
# bilinear in x and y: half to each
BILINEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": lambda x, y: x * y,
    "multiply": lambda x, y: torch.multiply(x, y),
    "bmm": lambda x, y: torch.bmm(x[None], y.mT[None]),
    "matmul": lambda x, y: x @ y.T,
    "mm": lambda x, y: torch.mm(x, y.T),
    "rmatmul": lambda x, y: x.__rmatmul__(y.T),
    "linear": lambda x, y: functional.linear(x, y),
    "conv1d": lambda x, y: functional.conv1d(x[None], y[None, :, :2]),
    "addmm": lambda x, y: torch.addmm(torch.zeros(3, dtype=torch.float64), x, y.T),
    "baddbmm": lambda x, y: torch.zeros(1, 3, 3, dtype=torch.float64).baddbmm(batch1=x[None], batch2=y.T[None]),
    "einsum": lambda x, y: torch.einsum("ij,kj->ik", x, y),
}
# numerator x, denominator from y
QUOTIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "div": lambda x, y: x / y,
    "divide": lambda x, y: torch.divide(x, y),
    "true_divide": lambda x, y: torch.true_divide(x, y),
}
# two classes' softmax: the true gradient, and a gate
SIGMOIDS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hardsigmoid": functional.hardsigmoid}
# their own tests below
APART = {*SIGMOIDS, "softmax", "scaled_dot_product_attention", "layer_norm", "rms_norm", "grouped_mm", "_grouped_mm"}


def pair() -> dict[str, Tensor]:
    """Positive, away from zero and from each other's entries."""
    generator = torch.Generator().manual_seed(8)
    return {name: 0.3 + 2 * torch.rand(3, 4, dtype=torch.float64, generator=generator) for name in "xy"}


def with_values_and_fisher(function: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> Any:
    """Result of `run` with the rules, after checking values and the true gradient bit for bit."""
    module = Function(function)
    plain, true, _ = run(module, inputs, no_rules)
    values, found, g = run(module, inputs, operation_rules)
    assert torch.equal(values, plain)
    for a, b in zip(found[Pass.FISHER], true[Pass.FISHER], strict=True):
        assert torch.equal(a, b)
    return values, found, g


def close(a: Tensor, b: Tensor, rtol: float = 1e-7) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12, check_dtype=False)


def test_every_row_has_a_sample() -> None:
    samples = {*LINEAR, *ELEMENTWISE, *SCALES, *BILINEAR, *QUOTIENTS} | APART
    assert samples == set(OPERATIONS)


@pytest.mark.parametrize("name", list(LINEAR))
def test_linear_operation_keeps_its_gradient_and_is_linear(name: str) -> None:
    y, found, g = with_values_and_fisher(LINEAR[name], pair())
    for running in RULE_PASSES:
        for a, b in zip(found[running], found[Pass.FISHER], strict=True):
            assert torch.equal(a, b)
    # Euler: only of what is linear (or a maximum) does gradient x input give the output
    relevance = sum((x * d).sum() for x, d in zip(pair().values(), found[Pass.LRP], strict=True))
    narrow = name in {"bfloat16", "half", "double"} or y.dtype is torch.float32
    close(relevance, (y * g).sum().double(), rtol=2e-2 if narrow else 1e-12)


@pytest.mark.parametrize("name", list(ELEMENTWISE))
def test_activation_follows_the_identity_rule(name: str) -> None:
    inputs = {"x": pair()["x"]}
    y, found, g = with_values_and_fisher(ELEMENTWISE[name], inputs)
    for running in RULE_PASSES:
        close(found[running][0], g * y / rules.stabilize(inputs["x"]))


@pytest.mark.parametrize("name", list(SIGMOIDS))
def test_sigmoid_keeps_its_gradient_and_is_a_gate(name: str) -> None:
    _, found, _ = with_values_and_fisher(SIGMOIDS[name], {"x": pair()["x"]})
    for running in RULE_PASSES:
        assert torch.equal(found[running][0], found[Pass.FISHER][0])
    _, found, _ = with_values_and_fisher(lambda x, y: SIGMOIDS[name](x) * y, pair())
    close(found[Pass.LRP][0], 0.5 * found[Pass.FISHER][0])
    close(found[Pass.LRP][1], 0.5 * found[Pass.FISHER][1])
    assert not found[Pass.CP_LRP][0].any()
    close(found[Pass.CP_LRP][1], found[Pass.FISHER][1])


@pytest.mark.parametrize("name", list(SCALES))
def test_scale_of_the_input_is_a_constant(name: str) -> None:
    inputs = {"x": pair()["x"]}
    scale = SCALES[name](inputs["x"])
    _, found, g = with_values_and_fisher(lambda x: x * SCALES[name](x), inputs)
    for running in RULE_PASSES:
        close(found[running][0], g * scale, rtol=1e-12)
    assert relative(found[Pass.LRP][0], found[Pass.FISHER][0]) > 0.05


@pytest.mark.parametrize("name", list(BILINEAR))
def test_product_shares_its_relevance_and_a_gate_gets_none_in_cp_lrp(name: str) -> None:
    _, found, _ = with_values_and_fisher(BILINEAR[name], pair())
    for running in RULE_PASSES:
        for a, b in zip(found[running], found[Pass.FISHER], strict=True):
            assert torch.equal(a, b / 2)
    # an activation is a gate also behind a mask, a cast and a constant factor, on either side of the product
    inputs = pair()
    for side in (0, 1):

        def gated(*xy: Tensor, side: int = side) -> Tensor:
            gate = 0.5 * torch.tanh(xy[side]).to(torch.float64).masked_fill(KEEP, 0.0).T.contiguous().T
            return BILINEAR[name](*(gate if i == side else x for i, x in enumerate(xy)))

        _, found, _ = with_values_and_fisher(gated, inputs)
        assert not found[Pass.CP_LRP][side].any()
        assert torch.equal(found[Pass.CP_LRP][1 - side], found[Pass.FISHER][1 - side])
        assert torch.equal(found[Pass.LRP][1 - side], found[Pass.FISHER][1 - side] / 2)
        assert found[Pass.LRP][side].any()


@pytest.mark.parametrize("name", list(QUOTIENTS))
def test_denominator_is_a_constant(name: str) -> None:
    inputs = pair()
    _, found, g = with_values_and_fisher(QUOTIENTS[name], inputs)
    for running in RULE_PASSES:
        close(found[running][0], g / inputs["y"], rtol=1e-12)
        assert not found[running][1].any()
    # only the denominator depends on the input: an elementwise function of it, or a normaliser
    y, found, g = with_values_and_fisher(lambda y: QUOTIENTS[name](FIXED, y), {"y": inputs["y"]})
    close(found[Pass.LRP][0], g * y / inputs["y"])
    y, found, g = with_values_and_fisher(lambda y: y + QUOTIENTS[name](FIXED, y.sum()), {"y": inputs["y"]})
    close(found[Pass.LRP][0], g, rtol=1e-12)


def test_product_with_a_weight_or_a_mask_stays_a_linear_layer() -> None:
    weight = nn.Parameter(FIXED.clone())
    for function in (lambda x: x * weight, lambda x: x @ (1 + weight).T, lambda x: x * FIXED / weight.exp()):
        _, found, _ = with_values_and_fisher(function, {"x": pair()["x"]})
        for running in RULE_PASSES:
            assert torch.equal(found[running][0], found[Pass.FISHER][0])


def test_grouped_product_is_a_product() -> None:
    weight = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    ends = torch.tensor([8, 16], dtype=torch.int32)
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    for product in (functional.grouped_mm, torch._grouped_mm):
        _, found, _ = with_values_and_fisher(lambda x, p=product: p(x, weight, offs=ends), {"x": x})
        assert torch.equal(found[Pass.LRP][0], found[Pass.FISHER][0])
        _, found, _ = with_values_and_fisher(lambda x, w, p=product: p(x, w, offs=ends), {"x": x, "w": weight})
        assert torch.equal(found[Pass.LRP][0], found[Pass.FISHER][0] / 2)
        assert torch.equal(found[Pass.CP_LRP][1], found[Pass.FISHER][1] / 2)


@pytest.mark.parametrize("by_name", [False, True])
def test_kernel_and_eager_attention_share_as_the_table_does(by_name: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    inputs = {name: torch.randn(1, 2, T, 4, dtype=torch.float64, generator=generator) for name in "qkv"}

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if by_name:
            return functional.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.5)
        return functional.scaled_dot_product_attention(q, k, v, None, 0.0, scale=0.5)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.dropout(functional.softmax(q @ k.mT * 0.5, dim=-1), 0.1, training=False) @ v

    for function in (kernel, eager):
        _, found, _ = with_values_and_fisher(function, inputs)
        for got, true, lrp, cp in zip(
            zip(found[Pass.LRP], found[Pass.CP_LRP], strict=True),
            found[Pass.FISHER],
            (0.25, 0.25, 0.5),
            (0.0, 0.0, 1.0),
            strict=True,
        ):
            close(got[0], lrp * true, rtol=1e-12)
            close(got[1], cp * true, rtol=1e-12)


def test_router_weights_are_a_gate() -> None:
    """softmax, top-k, normalised in place, times an expert's output: half, and constant in CP_LRP."""

    def routed(scores: Tensor, expert: Tensor) -> Tensor:
        weights, index = torch.topk(functional.softmax(scores, dim=-1), 2)
        weights /= weights.sum(-1, keepdim=True)
        output = torch.zeros_like(expert)
        for k in range(2):
            output.index_add_(0, torch.arange(3), expert * weights[:, k, None] * (1.0 + index[:, k, None]))
        return output

    _, found, _ = with_values_and_fisher(routed, pair())
    assert not found[Pass.CP_LRP][0].any()
    assert found[Pass.LRP][0].any()
    assert torch.equal(found[Pass.CP_LRP][1], found[Pass.FISHER][1])
    assert torch.equal(found[Pass.LRP][1], found[Pass.FISHER][1] / 2)


NORMS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "layer_norm": (
        lambda x, w, b: functional.layer_norm(x, (4,), w, b),
        lambda x, w, b: (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * w + b,
    ),
    "layer_norm without weights": (
        lambda x, w, b: functional.layer_norm(x, normalized_shape=[4], eps=1e-3),
        lambda x, w, b: (x - x.mean(-1, keepdim=True)) * (x.var(-1, correction=0, keepdim=True) + 1e-3).pow(-0.5),
    ),
    "rms_norm": (
        lambda x, w, b: functional.rms_norm(x, (4,), w, 1e-5),
        lambda x, w, b: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
    ),
    "rms_norm without weights": (
        lambda x, w, b: functional.rms_norm(x, (4,)),
        lambda x, w, b: x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt(),
    ),
}


@pytest.mark.parametrize("name", list(NORMS))
def test_norm_kernels_agree_with_norms_written_out(name: str) -> None:
    kernel, written = NORMS[name]
    w, b = (nn.Parameter(row.clone()) for row in FIXED[:2])
    y, found, _ = with_values_and_fisher(lambda x: kernel(x, w, b), {"x": pair()["x"]})
    y_written, expected, _ = with_values_and_fisher(lambda x: written(x, w, b), {"x": pair()["x"]})
    close(y, y_written, rtol=1e-12)
    for running in RULE_PASSES:
        close(found[running][0], expected[running][0], rtol=1e-10)
    assert relative(found[Pass.LRP][0], found[Pass.FISHER][0]) > 0.05
    with_values_and_fisher(lambda x: kernel(x, w.bfloat16(), b.bfloat16()), {"x": pair()["x"].bfloat16()})


def test_gate_and_value_of_one_layer_are_told_apart() -> None:
    """The two halves of a fused projection have one node in the graph."""

    def fused(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, -1)
        return functional.silu(gate) * value

    _, found, _ = with_values_and_fisher(fused, {"x": pair()["x"]})
    assert not found[Pass.CP_LRP][0][:, :2].any()
    assert torch.equal(found[Pass.CP_LRP][0][:, 2:], found[Pass.FISHER][0][:, 2:])
    assert torch.equal(found[Pass.LRP][0][:, 2:], found[Pass.FISHER][0][:, 2:] / 2)


def test_only_entry_by_entry_functions_of_one_tensor_are_one_activation() -> None:
    x = pair()["x"]
    t = torch.tanh(x)
    _, found, g = with_values_and_fisher(lambda x: torch.tanh(x).flip(0) * x, {"x": x})
    close(found[Pass.LRP][0], g * t.flip(0) / 2 + (g * x).flip(0) * t / x / 2)
    close(found[Pass.CP_LRP][0], g * t.flip(0), rtol=1e-12)

    def widened(x: Tensor) -> Tensor:
        a = x[:, :1]
        return a * torch.tanh(a * FIXED)

    y, found, g = with_values_and_fisher(widened, {"x": x})
    close(found[Pass.LRP][0][:, 0], (g * y).sum(-1) / x[:, 0])
    close(found[Pass.CP_LRP][0][:, 0], (g * y).sum(-1) / x[:, 0])


def test_product_of_gates_is_a_gate() -> None:
    _, found, g = with_values_and_fisher(lambda x, y: (torch.tanh(x) * torch.sigmoid(y)) * (x + y), pair())
    gate = torch.tanh(pair()["x"]) * torch.sigmoid(pair()["y"])
    for got in found[Pass.CP_LRP]:
        close(got, g * gate, rtol=1e-12)


def test_inverse_of_an_entry_with_its_mean_is_no_normaliser() -> None:
    y, found, g = with_values_and_fisher(lambda x: (x + x.mean(-1, keepdim=True)).rsqrt(), {"x": pair()["x"]})
    close(relevance_sum(pair()["x"], found[Pass.LRP][0]), relevance_sum(y, g), rtol=1e-6)


def test_activation_module_of_many_operations_is_one_activation() -> None:
    x = {"x": pair()["x"] - 1.0}
    for act in (NewGELUActivation(), LaplaceActivation(), nn.ReLU(inplace=True)):
        module = Function(lambda x, act=act: act(x * 1.0), act=act)
        plain, true, _ = run(module, x, no_rules)
        y, found, g = run(module, x, operation_rules)
        assert torch.equal(y, plain)
        assert torch.equal(found[Pass.FISHER][0], true[Pass.FISHER][0])
        close(found[Pass.LRP][0], g * y / rules.stabilize(x["x"]))


# --- in place -------------------------------------------------------------------------------------

IN_PLACE: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "mul_": (lambda c, y: c.mul_(torch.tanh(y)), lambda c, y: c * torch.tanh(y)),
    "div_": (lambda c, y: c.div_(y.sum()), lambda c, y: c / y.sum()),
    "constant": (lambda c, y: c.mul_(FIXED).add_(1.0).div_(2.0), lambda c, y: (c * FIXED + 1.0) / 2.0),
    "tanh_": (lambda c, y: c.tanh_(), lambda c, y: c.tanh()),
    "silu, inplace": (lambda c, y: functional.silu(c, True), lambda c, y: functional.silu(c)),
    "elu_": (lambda c, y: functional.elu_(c), lambda c, y: functional.elu(c)),
    "pow_": (lambda c, y: c.__ipow__(2), lambda c, y: c**2),
    "add_": (lambda c, y: c.add_(y, alpha=2.0), lambda c, y: c + 2.0 * y),
    "masked_fill_": (lambda c, y: c.masked_fill_(KEEP, 0.0), lambda c, y: c.masked_fill(KEEP, 0.0)),
    "a view": (lambda c, y: c[1:].mul_(y[1:]), lambda c, y: torch.cat([c[:1], c[1:] * y[1:]])),
    "a buffer": (lambda c, y: c.copy_(torch.zeros_like(c).add_(y)), lambda c, y: y * 1.0),
}


@pytest.mark.parametrize("name", list(IN_PLACE))
def test_in_place_gives_what_a_new_tensor_gives(name: str) -> None:
    in_place, new = IN_PLACE[name]
    y, found, _ = with_values_and_fisher(lambda x, y: 3.0 * changed(x, lambda c: in_place(c, y)), pair())
    y_new, expected, _ = with_values_and_fisher(lambda x, y: 3.0 * new(1.0 * x, y), pair())
    assert torch.equal(y, y_new)
    for running in RULE_PASSES:
        for a, b in zip(found[running], expected[running], strict=True):
            close(a, b, rtol=1e-8)  # of x * x: identity rule or two halves, apart by the stabiliser


# --- refusals -------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


def double(x: Tensor) -> Tensor:
    y: Tensor = Doubled.apply(x)  # type: ignore[no-untyped-call]
    return y


def stale_view(x: Tensor) -> Tensor:
    base = 1.0 * x
    view = base.view(-1)
    base.add_(1.0)
    return view * 2.0


def hidden_leaf(x: Tensor) -> Tensor:
    return x * torch.ones(4, dtype=torch.float64).requires_grad_()


HERE = r"in module inner of class Function"
REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "method": (lambda x, y: x.cumprod(-1), rf"torch\.Tensor\.cumprod {HERE}: no relevance rule is known"),
    "function": (lambda x, y: functional.glu(x), rf"torch\.nn\.functional\.glu {HERE}: no relevance rule"),
    "operator": (lambda x, y: torch.ops.aten.sinh.default(x), rf"aten\.sinh\.default {HERE}: no relevance rule"),
    "in place": (lambda x, y: (x * 1.0).cumprod_(-1), rf"cumprod_ {HERE}: no relevance rule"),
    "custom function": (lambda x, y: double(x) + y, rf"a tensor {HERE} was made by DoubledBackward"),
    "custom function, last": (lambda x, y: double(x), rf"a tensor {HERE} was made by DoubledBackward"),
    "stale view": (lambda x, y: stale_view(x), rf"a tensor {HERE} was made by AsStrided"),
    "leaf": (lambda x, y: hidden_leaf(x), "it is a leaf"),
    "act in place": (lambda x, y: functional.silu(x).add_(1.0), rf"add_ {HERE} changes the output of an activation"),
    "norm in place": (
        lambda x, y: functional.layer_norm(x, (4,)).view(-1).mul_(2.0),
        rf"mul_ {HERE} changes the output of an activation or a norm",
    ),
    "two axes": (lambda x, y: functional.layer_norm(x, (3, 4)), rf"layer_norm {HERE}: expected the norm of one axis"),
    "weight": (lambda x, y: functional.rms_norm(x, (4,), y[0]), rf"rms_norm {HERE}: expected the tensors"),
    "three factors": (lambda x, y: torch.einsum("ij,ij,ij->i", x, y, x), r"einsum .*positions \(1, 2\)"),
    "list of factors": (lambda x, y: torch.einsum("ij,ij->i", [x, y]), "einsum .* positional"),
    "mask": (
        lambda x, y: functional.scaled_dot_product_attention(x[None], x[None], x[None], y[:, :3]),
        "attention .* mask",
    ),
    "bounds": (lambda x, y: x.clamp(min=y), "clamp .*positional"),
    "two inputs": (lambda x, y: x**y, "__pow__ .*expected one argument"),
    "rounded": (lambda x, y: torch.div(x, 2.0, rounding_mode="floor"), "division without rounding"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_has_no_rule_is_refused_by_name_and_place(name: str) -> None:
    function, message = REFUSED[name]
    inner = Function(function)
    module = Function(lambda x, y: inner(x, y), inner=inner)
    with pytest.raises(ModelError, match=message):
        run(module, pair(), operation_rules)
    assert "forward" not in module.__dict__
    assert "forward" not in inner.__dict__
    run(inner, pair(), no_rules)  # the function itself is well


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - APART))
def test_without_its_row_an_operation_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "OPERATIONS", {key: rule for key, rule in OPERATIONS.items() if key != name})
    samples: Mapping[str, Callable[..., Tensor]] = QUOTIENTS | BILINEAR | SCALES | ELEMENTWISE | LINEAR
    inputs = pair() if name in {*LINEAR, *BILINEAR, *QUOTIENTS} else {"x": pair()["x"]}
    with pytest.raises(ModelError, match=r"no relevance rule is known|where no torch function was seen"):
        run(Function(samples[name]), inputs, operation_rules)


def test_an_operator_of_another_library_is_not_taken_for_the_one_of_its_name() -> None:
    library: Any = torch.library.Library("lrpq_test", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("mul(Tensor x, Tensor y) -> Tensor")
    library.impl("mul", lambda x, y: x * y + 1.0, "CompositeImplicitAutograd")
    with pytest.raises(ModelError, match=r"lrpq_test\.mul.*no relevance rule"):
        run(Function(lambda x, y: torch.ops.lrpq_test.mul(x, y)), pair(), operation_rules)


# --- scope ----------------------------------------------------------------------------------------


def test_scope_ends_with_everything_as_before_and_nests_safely() -> None:
    found: tuple[Any, Tensor, dict[str, Any]] = captured(build("llama"))[0]
    block, hidden, arguments = found
    before = {name: dict(m.__dict__) for name, m in block.named_modules()}
    switch = PassSwitch(current=Pass.LRP)

    def gradient() -> Tensor:
        leaf = hidden.clone().requires_grad_()
        return torch.autograd.grad(block(leaf, **arguments).sum(), leaf)[0]

    true = gradient()
    with operation_rules(block, switch):
        expected = gradient()
        assert relative(expected, true) > 0.1
        with operation_rules(block, switch), operation_rules(block.mlp, switch):
            assert torch.equal(gradient(), expected)
        assert torch.equal(gradient(), expected)
        for other in (
            operation_rules(block, PassSwitch()),
            apply_rules(block, PassSwitch()),
            operation_rules(nn.Sequential(block), switch),
        ):
            with pytest.raises(ModelError, match=r"another switch|already replaced"), other:
                pass
        assert torch.equal(gradient(), expected)
        leaf = torch.ones(3).requires_grad_()
        leaf.cumprod(0)  # outside any forward nothing is looked at
    assert {name: dict(m.__dict__) for name, m in block.named_modules()} == before
    assert torch.equal(gradient(), true)
    with apply_rules(block, switch), pytest.raises(ModelError, match="already replaced"):
        with operation_rules(block, switch):
            pass


def test_a_part_called_alone_follows_the_rules_too_and_an_error_inside_ends_the_mode() -> None:
    def fail(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    part = Function(lambda x: x * x.tanh())
    module = Function(fail, part=part)
    switch = PassSwitch(current=Pass.LRP)
    x = pair()["x"].requires_grad_()
    with operation_rules(module, switch):
        with pytest.raises(ZeroDivisionError):
            module(x)
        x.cumprod(-1)
        y = part(x)
    close(torch.autograd.grad(y.sum(), x)[0], (y / rules.stabilize(x)).detach())
