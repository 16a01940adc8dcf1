"""Rules per operation instead of per module: relevance for architectures without a row in the table of modules.

While a module's forward runs, every torch function that sees a tensor which depends on the module's input is looked up
in `OPERATIONS` by its name and given the gradient of its rule; the idea of DynamicLRP (2025), with AttnLRP's rules. The
passes are those of `rules`: FISHER is the true gradient, values are those of the plain forward, both bit for bit.

    operation                            LRP                           CP_LRP
    moves, sums, maxima (linear)         true gradient                 the same
    activation, elementwise of one       g y/z (identity rule)         the same
    a * b, matmul(a, b), both dependent  half to each                  the gate is a constant, all to the other one;
                                                                       half to each where none or both are gates
    a / b                                b is a constant               the same
    norm, var, std; inverse of a         constant                      the same
    reduction (rsqrt of a mean, ...)
    softmax, sigmoid                     keeps its own gradient        the same; its output is a gate
    attention kernel, norm kernels       as in `rules`                 as in `rules`

*Depends on the input*: requires a gradient, is not computed from weights alone, and is not one of the constants above.
*Gate*: the output of an activation or a softmax, also after casts, masks, moves and factors that do not depend on the
input. A product of elementwise functions of one tensor, as z * sigmoid(z), is an activation of that tensor.

Where this differs from the table of modules: a tanh soft cap of attention scores follows the identity rule, and the sum
that normalises router weights is a constant; the table differentiates both. The identity rule on a function with
f(0) != 0 (exp, softplus) has slopes of f(0)/z near zero, as large as `rules.EPSILON` lets them be.

Refused by name: an operation without a row; a tensor made where no torch function is seen (custom autograd functions,
compiled or scripted code, a view taken before its base was changed in place); changing the output of an activation or
norm kernel in place. Other changes in place are followed. If one overwrites what a rule has kept (an activation's
input, a factor), autograd itself refuses when backward runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS, LinearActivation

from lrpq.errors import ModelError
from lrpq.relevance import rules
from lrpq.relevance.rules import CONSTANT, QUERY_KEY, VALUE, Pass, PassSwitch
from lrpq.relevance.tracing import Call, Rule, RuleBook, RuleScope, Trace, described, key_of

HALF: Mapping[Pass, float] = {Pass.LRP: 0.5, Pass.CP_LRP: 0.5}
HALF_OF_GATE: Mapping[Pass, float] = {Pass.LRP: 0.5, Pass.CP_LRP: 0.0}
HALF_OF_VALUE: Mapping[Pass, float] = {Pass.LRP: 0.5}


def moves(call: Call) -> tuple[Any, Trace]:
    """Values change their place (or are summed over places): linear, true gradient."""
    trace = call.common()  # first: in place, the arguments change
    return call.native(), replace(trace, origin=None)


def entrywise(call: Call) -> tuple[Any, Trace]:
    """Linear in its arguments (or one of them, for maxima and masks) and entry by entry: true gradient."""
    trace = call.common()
    return call.native(), trace


def reduction(call: Call) -> tuple[Any, Trace]:
    """Sum, mean or maximum over an axis: true gradient."""
    return call.native(), Trace(reduced=True)


def activation(call: Call) -> tuple[Any, Trace]:
    """Elementwise function of one tensor: identity rule."""
    if len(places := call.places()) != 1:
        call.refuse("expected one argument that depends on the input")
    before, z, after = call.args[: places[0]], call.args[places[0]], call.args[places[0] + 1 :]
    y = rules.identity_rule(lambda z: call.function(*before, z, *after, **call.kwargs), z, call.mode.switch)
    return y, Trace(gate=True, reduced=call.mode.trace(z).reduced, origin=call.origin(z))


def sigmoid(call: Call) -> tuple[Any, Trace]:
    """The softmax of two classes: keeps its own gradient, as softmax does.

    The identity rule would have a slope of f(0)/z near zero: in blocks with sigmoid gates or routers relevance then
    grows to a hundred times the true gradient's norm.
    """
    trace = call.common()
    return call.native(), replace(trace, gate=True)


def normaliser(call: Call) -> tuple[Any, Trace]:
    """A measure of scale: constant."""
    return call.native(dict.fromkeys(call.places(), CONSTANT)), Trace(constant=True)


def inverse(call: Call) -> tuple[Any, Trace]:
    """Of a reduction: a normaliser. Otherwise an elementwise function."""
    return normaliser(call) if call.common().reduced else activation(call)


def power(call: Call) -> tuple[Any, Trace]:
    """Elementwise; a negative exponent inverts."""
    exponent = call.args[1] if len(call.args) > 1 else call.kwargs.get("exponent")
    return inverse(call) if isinstance(exponent, int | float) and exponent < 0 else activation(call)


def product(
    call: Call,
    factors: tuple[int, int] = (0, 1),
    addend: int | None = None,
    *,
    names: Sequence[str] = (),
    elementwise: bool = False,
) -> tuple[Any, Trace]:
    """Bilinear in the arguments at ``factors``, linear in that at ``addend``; ``names`` of the first arguments."""
    call = call.positional(names)
    places = call.places()
    if not set(places) <= {*factors, addend}:
        call.refuse(f"expected only the arguments at positions {factors} (from 0) to depend on the input")
    if not set(factors) <= set(places):
        return call.native(), call.common() if elementwise else Trace()
    a, b = (call.args[i] for i in factors)
    if elementwise and (composed := _composed(call, a, b)):
        return composed
    gates = [call.mode.trace(x).gate for x in (a, b)]
    if all(gates) or not any(gates):
        return call.native(dict.fromkeys(factors, HALF)), Trace(gate=all(gates))
    return call.native({i: HALF_OF_GATE if g else HALF_OF_VALUE for i, g in zip(factors, gates, strict=True)}), Trace()


def quotient(call: Call) -> tuple[Any, Trace]:
    """Denominator constant, numerator linear."""
    places = call.places()
    if call.kwargs.get("rounding_mode") is not None:
        call.refuse("expected a division without rounding")
    if places == [0]:
        return entrywise(call)
    if places == [1]:
        return inverse(call)
    if composed := _composed(call, *call.args[:2]):
        return composed
    return call.native({1: CONSTANT}), call.mode.trace(call.args[0])


def _composed(call: Call, a: Tensor, b: Tensor) -> tuple[Tensor, Trace] | None:
    """The identity rule, if ``a`` and ``b`` are elementwise functions of one tensor."""
    z = call.origin(a)
    if key_of(z) != key_of(call.origin(b)):
        return None
    return rules.identity_rule(lambda _: call.native(), z, call.mode.switch), Trace(gate=True, origin=z)


def softmax(call: Call) -> tuple[Any, Trace]:
    """Keeps its own gradient (AttnLRP's rule for softmax in gradient form)."""
    return call.native(), Trace(gate=True)


def attention(call: Call) -> tuple[Any, Trace]:
    """Attention kernel: query and key a quarter, value a half."""
    call = call.positional(("query", "key", "value"))
    if not set(call.places()) <= {0, 1, 2}:
        call.refuse("expected a mask that does not depend on the input")
    return call.native({0: QUERY_KEY, 1: QUERY_KEY, 2: VALUE}), Trace()


def layer_norm(call: Call) -> tuple[Any, Trace]:
    """`rules.layer_norm`."""

    def run(
        input: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Any:
        _check_norm(call, normalized_shape)
        return rules.layer_norm(input, weight, bias, eps, call.mode.switch)

    return run(*call.args, **call.kwargs), Trace()


def rms_norm(call: Call) -> tuple[Any, Trace]:
    """The kernel's values, the gradient of `rules.rms_norm`."""

    def run(input: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
        _check_norm(call, normalized_shape)
        gain = input.new_ones(()) if weight is None else weight
        epsilon = torch.finfo(input.dtype).eps if eps is None else eps
        y_rule = rules.rms_norm(input, gain, epsilon, call.mode.switch)
        return rules.route(call.native(), y_rule, call.mode.switch)

    return run(*call.args, **call.kwargs), Trace()


def _check_norm(call: Call, shape: Sequence[int]) -> None:
    if call.places() != [0] or len(shape) != 1:
        call.refuse("expected the norm of one axis, with a weight and bias that do not depend on the input")


MOVES = """alias broadcast_to cat chunk concat cumsum diagonal expand expand_as flatten flip gather getitem index_add
    index_copy index_put index_select masked_scatter masked_select movedim mT narrow pad permute repeat
    repeat_interleave reshape reshape_as roll scatter scatter_add select setitem split split_with_sizes squeeze stack
    swapaxes t T take_along_dim tensor_split tile topk transpose tril triu unbind unflatten unfold unsqueeze view
    view_as view_as_complex view_as_real"""
ENTRYWISE = """add bfloat16 clone contiguous copy double fill float half masked_fill maximum minimum neg
    negative rsub sub subtract to type type_as where zero"""
REDUCTIONS = "amax amin max mean min sum"
ACTIVATIONS = """abs celu clamp clamp_max clamp_min clip elu erf exp expm1 gelu hardswish hardtanh
    leaky_relu log log1p log_sigmoid mish relu relu6 selu silu softplus softsign sqrt square tanh"""

OPERATIONS: Mapping[str, Rule] = {
    **dict.fromkeys(MOVES.split(), moves),
    **dict.fromkeys(ENTRYWISE.split(), entrywise),
    **dict.fromkeys(REDUCTIONS.split(), reduction),
    **dict.fromkeys(ACTIVATIONS.split(), activation),
    **dict.fromkeys(("linalg_norm", "linalg_vector_norm", "norm", "std", "var"), normaliser),
    **dict.fromkeys(("rdiv", "reciprocal", "rsqrt"), inverse),
    **dict.fromkeys(("mul", "multiply"), partial(product, elementwise=True)),
    **dict.fromkeys(("bmm", "matmul", "mm", "rmatmul"), product),
    **dict.fromkeys(("grouped_mm", "_grouped_mm"), product),
    **dict.fromkeys(("conv1d", "linear"), partial(product, addend=2)),
    "addmm": partial(product, factors=(1, 2), addend=0, names=("input", "mat1", "mat2")),
    "baddbmm": partial(product, factors=(1, 2), addend=0, names=("input", "batch1", "batch2")),
    **dict.fromkeys(("div", "divide", "true_divide"), quotient),
    "einsum": partial(product, factors=(1, 2)),
    "pow": power,
    "softmax": softmax,
    **dict.fromkeys(("sigmoid", "hardsigmoid"), sigmoid),
    "scaled_dot_product_attention": attention,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
}
"""Rule of every operation that is known, by the name of the function, method, operator or property."""

ACTIVATION_MODULES = frozenset(
    {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
    | {nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardtanh}
) - {LinearActivation, nn.Sigmoid, nn.Hardsigmoid}
"""Classes whose whole forward is one activation, of however many operations it is made."""

SCOPE = "_lrpq_operations"


@contextmanager
def operation_rules(module: nn.Module, switch: PassSwitch) -> Iterator[None]:
    """Inside the scope, graphs built by ``module`` follow the pass that ``switch`` names when backward runs.

    Works on any architecture whose operations have a row in `OPERATIONS`; costs time in Python for each of them. Only
    the instance attribute ``forward`` of the modules changes, and is put back on leaving; torch functions are looked at
    only while one of these forwards runs with gradients enabled, in its thread. A scope inside a scope of the same
    switch does nothing.

    Raises:
        ModelError: on entry, a module's forward is replaced already, by rules or otherwise; while a forward runs, see
            the module's docstring for what is refused.
    """
    if module.__dict__.get(SCOPE) is switch:
        yield
        return
    members = list(module.named_modules())
    for name, member in members:
        if "forward" in member.__dict__:
            raise ModelError(
                f"the forward of {described(name, member)} is already replaced on the instance, by rules or otherwise: "
                "expected the class's own; leave that scope first"
            )
    book = RuleBook(
        operations=OPERATIONS,
        in_place=(moves, entrywise),
        activation=activation,
        activation_modules=ACTIVATION_MODULES,
    )
    scope = RuleScope(switch=switch, book=book)
    try:
        for name, member in members:
            member.__dict__.update({"forward": scope.wrapped(name, member), SCOPE: switch})
        yield
    finally:
        for _, member in members:
            for attribute in ("forward", SCOPE):
                member.__dict__.pop(attribute, None)
