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
    softmax                              keeps its own gradient        the same; its output is a gate
    attention kernel, norm kernels       as in `rules`                 as in `rules`

*Depends on the input*: requires a gradient, is not computed from weights alone, and is not one of the constants above.
*Gate*: the output of an activation or a softmax, also after casts, masks, moves and factors that do not depend on the
input. A product of elementwise functions of one tensor, as z * sigmoid(z), is an activation of that tensor.

Where this differs from the table of modules: a tanh soft cap of attention scores follows the identity rule, and the sum
that normalises router weights is a constant; the table differentiates both. The identity rule on a function with
f(0) != 0 (sigmoid, exp, softplus) has slopes of f(0)/z near zero, as large as `rules.EPSILON` lets them be.

Refused by name: an operation without a row; a tensor made where no torch function is seen (custom autograd functions,
compiled or scripted code, a view taken before its base was changed in place); changing the output of an activation or
norm kernel in place. Other changes in place are followed. If one overwrites what a rule has kept (an activation's
input, a factor), autograd itself refuses when backward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name
from transformers.activations import ACT2CLS, LinearActivation

from lrpq.errors import ModelError
from lrpq.relevance import rules
from lrpq.relevance.rules import CONSTANT, QUERY_KEY, VALUE, Pass, PassSwitch

HALF: Mapping[Pass, float] = {Pass.LRP: 0.5, Pass.CP_LRP: 0.5}
HALF_OF_GATE: Mapping[Pass, float] = {Pass.LRP: 0.5, Pass.CP_LRP: 0.0}
HALF_OF_VALUE: Mapping[Pass, float] = {Pass.LRP: 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trace:
    """What is known of a tensor that requires a gradient."""

    constant: bool = False
    """The relevance passes see a constant: a normaliser, or computed from weights alone."""
    gate: bool = False
    reduced: bool = False
    """Elementwise function of a sum, mean or maximum: its inverse is a normaliser."""
    origin: Tensor | None = None
    """Tensor of which it is an elementwise function; None: of itself only."""


@dataclass(slots=True)
class _Call:
    """One call of a torch function, some of whose arguments depend on the input."""

    mode: _OperationMode
    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    live: Sequence[Tensor]
    """Arguments that depend on the input."""

    def native(self, factors: Mapping[int, Mapping[Pass, float]] | None = None) -> Any:
        """Run it; ``factors`` scale the gradients of the arguments at these positions (`rules.scale_gradient`)."""
        args = list(self.args)
        for position, factor in (factors or {}).items():
            args[position] = rules.scale_gradient(args[position], factor, self.mode.switch)
        return self.function(*args, **self.kwargs)

    def positional(self, names: Sequence[str]) -> _Call:
        """The same with the arguments of these names, which are the first ones, by position."""
        args, kwargs = list(self.args), dict(self.kwargs)
        while len(args) < len(names) and names[len(args)] in kwargs:
            args.append(kwargs.pop(names[len(args)]))
        return replace(self, args=args, kwargs=kwargs)

    def places(self) -> list[int]:
        """Positions of the arguments that depend on the input."""
        places = [i for i, x in enumerate(self.args) if any(x is t for t in self.live)]
        if len(places) < len(self.live):
            self.refuse("expected the tensors that depend on the input as positional arguments")
        return places

    def origin(self, x: Tensor) -> Tensor:
        found = self.mode.trace(x).origin
        return x if found is None else found

    def common(self) -> _Trace:
        """Trace of an elementwise result that is linear in all arguments that depend on the input."""
        traces = [self.mode.trace(x) for x in self.live]
        origins = [self.origin(x) for x in self.live]
        return _Trace(
            gate=all(t.gate for t in traces),
            reduced=all(t.reduced for t in traces),
            origin=origins[0] if len({_key(x) for x in origins}) == 1 else None,
        )

    def refuse(self, reason: str) -> NoReturn:
        raise ModelError(
            f"{_title(self.function)} {self.mode.where()}: {reason}; use relevance fisher, which needs no rules"
        )


Rule = Callable[[_Call], tuple[Any, _Trace]]
"""From a call to its result, with the rule's gradient, and the result's trace."""


def moves(call: _Call) -> tuple[Any, _Trace]:
    """Values change their place (or are summed over places): linear, true gradient."""
    trace = call.common()  # first: in place, the arguments change
    return call.native(), replace(trace, origin=None)


def entrywise(call: _Call) -> tuple[Any, _Trace]:
    """Linear in its arguments (or one of them, for maxima and masks) and entry by entry: true gradient."""
    trace = call.common()
    return call.native(), trace


def reduction(call: _Call) -> tuple[Any, _Trace]:
    """Sum, mean or maximum over an axis: true gradient."""
    return call.native(), _Trace(reduced=True)


def activation(call: _Call) -> tuple[Any, _Trace]:
    """Elementwise function of one tensor: identity rule."""
    if len(places := call.places()) != 1:
        call.refuse("expected one argument that depends on the input")
    before, z, after = call.args[: places[0]], call.args[places[0]], call.args[places[0] + 1 :]
    y = rules.identity_rule(lambda z: call.function(*before, z, *after, **call.kwargs), z, call.mode.switch)
    return y, _Trace(gate=True, reduced=call.mode.trace(z).reduced, origin=call.origin(z))


def normaliser(call: _Call) -> tuple[Any, _Trace]:
    """A measure of scale: constant."""
    return call.native(dict.fromkeys(call.places(), CONSTANT)), _Trace(constant=True)


def inverse(call: _Call) -> tuple[Any, _Trace]:
    """Of a reduction: a normaliser. Otherwise an elementwise function."""
    return normaliser(call) if call.common().reduced else activation(call)


def power(call: _Call) -> tuple[Any, _Trace]:
    """Elementwise; a negative exponent inverts."""
    exponent = call.args[1] if len(call.args) > 1 else call.kwargs.get("exponent")
    return inverse(call) if isinstance(exponent, int | float) and exponent < 0 else activation(call)


def product(
    call: _Call,
    factors: tuple[int, int] = (0, 1),
    addend: int | None = None,
    *,
    names: Sequence[str] = (),
    elementwise: bool = False,
) -> tuple[Any, _Trace]:
    """Bilinear in the arguments at ``factors``, linear in that at ``addend``; ``names`` of the first arguments."""
    call = call.positional(names)
    places = call.places()
    if not set(places) <= {*factors, addend}:
        call.refuse(f"expected only the arguments at positions {factors} (from 0) to depend on the input")
    if not set(factors) <= set(places):
        return call.native(), call.common() if elementwise else _Trace()
    a, b = (call.args[i] for i in factors)
    if elementwise and (composed := _composed(call, a, b)):
        return composed
    gates = [call.mode.trace(x).gate for x in (a, b)]
    if all(gates) or not any(gates):
        return call.native(dict.fromkeys(factors, HALF)), _Trace(gate=all(gates))
    return call.native({i: HALF_OF_GATE if g else HALF_OF_VALUE for i, g in zip(factors, gates, strict=True)}), _Trace()


def quotient(call: _Call) -> tuple[Any, _Trace]:
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


def _composed(call: _Call, a: Tensor, b: Tensor) -> tuple[Tensor, _Trace] | None:
    """The identity rule, if ``a`` and ``b`` are elementwise functions of one tensor."""
    z = call.origin(a)
    if _key(z) != _key(call.origin(b)):
        return None
    return rules.identity_rule(lambda _: call.native(), z, call.mode.switch), _Trace(gate=True, origin=z)


def softmax(call: _Call) -> tuple[Any, _Trace]:
    """Keeps its own gradient (AttnLRP's rule for softmax in gradient form)."""
    return call.native(), _Trace(gate=True)


def attention(call: _Call) -> tuple[Any, _Trace]:
    """Attention kernel: query and key a quarter, value a half."""
    call = call.positional(("query", "key", "value"))
    if not set(call.places()) <= {0, 1, 2}:
        call.refuse("expected a mask that does not depend on the input")
    return call.native({0: QUERY_KEY, 1: QUERY_KEY, 2: VALUE}), _Trace()


def layer_norm(call: _Call) -> tuple[Any, _Trace]:
    """`rules.layer_norm`."""

    def run(
        input: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Any:
        _check_norm(call, normalized_shape)
        return rules.layer_norm(input, weight, bias, eps, call.mode.switch)

    return run(*call.args, **call.kwargs), _Trace()


def rms_norm(call: _Call) -> tuple[Any, _Trace]:
    """The kernel's values, the gradient of `rules.rms_norm`."""

    def run(input: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
        _check_norm(call, normalized_shape)
        gain = input.new_ones(()) if weight is None else weight
        epsilon = torch.finfo(input.dtype).eps if eps is None else eps
        y_rule = rules.rms_norm(input, gain, epsilon, call.mode.switch)
        return rules.route(call.native(), y_rule, call.mode.switch)

    return run(*call.args, **call.kwargs), _Trace()


def _check_norm(call: _Call, shape: Sequence[int]) -> None:
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
ACTIVATIONS = """abs celu clamp clamp_max clamp_min clip elu erf exp expm1 gelu hardsigmoid hardswish hardtanh
    leaky_relu log log1p log_sigmoid mish relu relu6 selu sigmoid silu softplus softsign sqrt square tanh"""

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
    "scaled_dot_product_attention": attention,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
}
"""Rule of every operation that is known, by the name of the function, method, operator or property."""

ACTIVATION_MODULES = frozenset(
    {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
    | {nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardsigmoid, nn.Hardtanh}
) - {LinearActivation}
"""Classes whose whole forward is one activation, of however many operations it is made."""

_SCOPE = "_lrpq_operations"
_INPUT, _WEIGHT = _Trace(), _Trace(constant=True)


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
    if module.__dict__.get(_SCOPE) is switch:
        yield
        return
    members = list(module.named_modules())
    for name, member in members:
        if "forward" in member.__dict__:
            raise ModelError(
                f"the forward of {_describe(name, member)} is already replaced on the instance, by rules or otherwise: "
                "expected the class's own; leave that scope first"
            )
    scope = _Scope(switch=switch)
    try:
        for name, member in members:
            member.__dict__.update({"forward": scope.wrapped(name, member), _SCOPE: switch})
        yield
    finally:
        for _, member in members:
            for attribute in ("forward", _SCOPE):
                member.__dict__.pop(attribute, None)


@dataclass(slots=True)
class _Scope:
    """Starts the mode at the outermost forward and keeps its path through the modules."""

    switch: PassSwitch
    mode: _OperationMode | None = None

    def wrapped(self, name: str, module: nn.Module) -> Callable[..., Any]:
        original: Callable[..., Any] = module.forward
        path = _describe(name, module)
        # One that may work in place is followed operation by operation.
        composed = type(module) in ACTIVATION_MODULES and not getattr(module, "inplace", False)

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return original(*args, **kwargs)
            if self.mode is not None:
                return self.mode.inside(path, original, args, kwargs, composed)
            self.mode = _OperationMode(self.switch, (args, kwargs))
            try:
                with self.mode:
                    return self.mode.inside(path, original, args, kwargs, composed)
            finally:
                self.mode = None

        return forward


class _OperationMode(TorchFunctionMode):
    """Applies `OPERATIONS` during one forward, and knows the traces of its tensors."""

    def __init__(self, switch: PassSwitch, inputs: Any) -> None:
        super().__init__()
        self.switch = switch
        self._traces: dict[tuple[Any, int], _Trace] = {}
        self._path: list[str] = []
        self._paused = False
        self._note(inputs, _INPUT)

    def where(self) -> str:
        return f"in {self._path[-1]}"

    def inside(
        self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], composed: bool
    ) -> Any:
        """Run a module's forward: as one activation, or operation by operation."""
        self._path.append(path)
        paused, self._paused = self._paused, self._paused or composed
        try:
            output = self._apply(forward, args, kwargs, activation)[0] if composed else forward(*args, **kwargs)
            for x in _differentiable(output):
                self.trace(x)
            return output
        finally:
            self._paused = paused
            self._path.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused or not torch.is_grad_enabled() or next(_differentiable((args, kwargs)), None) is None:
            return func(*args, **kwargs)
        name, in_place = _name(func)
        rule = OPERATIONS.get(name)
        if not in_place and not kwargs.get("inplace"):
            return self._apply(func, args, kwargs, rule)[0]
        try:
            return self._apply_in_place(name, func, args, kwargs, rule)
        except RuntimeError as error:
            if "custom Function" not in str(error):
                raise
            raise ModelError(
                f"{_title(func)} {self.where()} changes the output of an activation or a norm in place, of which "
                "autograd would lose the rule; use relevance fisher, which needs no rules"
            ) from error

    def trace(self, x: Tensor) -> _Trace:
        """Trace of a tensor that requires a gradient."""
        found = self._traces.get(_key(x))
        if found is not None:
            return found
        if isinstance(x, nn.Parameter):
            return _WEIGHT
        maker = "nobody: it is a leaf" if x.grad_fn is None else x.grad_fn.name()
        raise ModelError(
            f"a tensor {self.where()} was made by {maker}, where no torch function was seen: expected no custom "
            "autograd function, no compiled or scripted code, no view of a tensor that was changed in place elsewhere; "
            "use relevance fisher, which needs no rules"
        )

    def _note(self, tensors: Any, trace: _Trace) -> None:
        for x in _differentiable(tensors):
            self._traces[_key(x)] = trace

    def _apply(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], rule: Rule | None
    ) -> tuple[Any, _Trace | None]:
        """Result and its trace; no trace if the operation has no rule and needs none."""
        live = [x for x in _differentiable((args, kwargs)) if not self.trace(x).constant]
        call = _Call(self, function, args, kwargs, live)
        if not live:
            result, trace = call.native(), _WEIGHT
        elif rule is not None:
            result, trace = rule(call)
        else:
            result, trace = call.native(), None
            if any(_key(x) not in self._traces for x in _differentiable(result)):
                call.refuse(
                    "no relevance rule is known: expected an operation of lrpq.relevance.operations.OPERATIONS; "
                    "add a row for it"
                )
        if trace is not None:
            self._note(result, trace)
        return result, trace

    def _apply_in_place(
        self, name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], rule: Rule | None
    ) -> Any:
        target = args[0]
        if rule in (None, moves, entrywise):
            result, trace = self._apply(function, args, kwargs, rule)
        else:
            # The rule gets a copy, since it may keep its arguments; then the values are put in place.
            copy = target.clone()
            if target.requires_grad:
                self._note(copy, self.trace(target))
            if kwargs.get("inplace"):
                kwargs = {**kwargs, "inplace": False}
            else:
                function = getattr(Tensor, name, None) or getattr(functional, name)
            found, trace = self._apply(function, [copy if x is target else x for x in args], kwargs, rule)
            result = target.copy_(found)
        if trace is not None:
            # What it is a view of has another grad_fn from now on.
            self._note(target._base, _Trace(constant=trace.constant))
            self._note(target, replace(trace, origin=None))
        return result


def _key(x: Tensor) -> tuple[Any, int]:
    """Identity of a value in the graph; of a leaf, which has no node, that of the tensor."""
    return (id(x), 0) if x.grad_fn is None else (x.grad_fn, x.output_nr)


def _differentiable(nested: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dictionaries that require a gradient."""
    if isinstance(nested, Tensor):
        if nested.requires_grad:
            yield nested
    elif isinstance(nested, tuple | list):
        for item in nested:
            yield from _differentiable(item)
    elif isinstance(nested, Mapping):
        yield from _differentiable(list(nested.values()))


@cache
def _name(function: Callable[..., Any]) -> tuple[str, bool]:
    """Name of a function, method, operator or property in `OPERATIONS`, and whether it works in place."""
    name: str = getattr(function, "__name__", str(function)).partition(".")[0]
    module = getattr(function, "__module__", None) or "torch"  # none: a method of a tensor
    if module.partition(".")[0] != "torch" or (module.startswith("torch._ops.") and module != "torch._ops.aten"):
        return f"{module}.{name}", False  # somebody's own, whatever its name
    if name == "__get__":
        attribute: Any = function.__self__  # type: ignore[attr-defined]
        return attribute.__name__, False
    if name.startswith("__"):
        return name.strip("_"), name == "__setitem__"
    return (name[:-1], True) if name.endswith("_") else (name, False)


def _title(function: Callable[..., Any]) -> str:
    return str(resolve_name(function) or getattr(function, "__name__", function))


def _describe(name: str, module: nn.Module) -> str:
    return f"module {name or '(root)'} of class {type(module).__name__}"
