"""Following the operations of a forward: which tensors depend on its input, and a rule's gradient for each operation.

`OperationMode` sees every torch function that a module's forward calls, looks up its rule in a `RuleBook` and notes
what is known of the result (`Trace`). What the rules are is `lrpq.relevance.operations`' business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name

from lrpq.errors import ModelError
from lrpq.relevance import rules
from lrpq.relevance.rules import Pass, PassSwitch


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What is known of a tensor that requires a gradient."""

    constant: bool = False
    """The relevance passes see a constant: a normaliser, or computed from weights alone."""
    gate: bool = False
    reduced: bool = False
    """Elementwise function of a sum, mean or maximum: its inverse is a normaliser."""
    origin: Tensor | None = None
    """Tensor of which it is an elementwise function; None: of itself only."""


@dataclass(slots=True)
class Call:
    """One call of a torch function, some of whose arguments depend on the input."""

    mode: OperationMode
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

    def positional(self, names: Sequence[str]) -> Call:
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
        """Tensor of which ``x`` is an elementwise function; ``x`` itself if of no other."""
        found = self.mode.trace(x).origin
        return x if found is None else found

    def common(self) -> Trace:
        """Trace of an elementwise result that is linear in all arguments that depend on the input."""
        traces = [self.mode.trace(x) for x in self.live]
        origins = [self.origin(x) for x in self.live]
        return Trace(
            gate=all(t.gate for t in traces),
            reduced=all(t.reduced for t in traces),
            origin=origins[0] if len({key_of(x) for x in origins}) == 1 else None,
        )

    def refuse(self, reason: str) -> NoReturn:
        """Raise ModelError with the operation, the module in which it runs, and the reason."""
        raise ModelError(
            f"{_title(self.function)} {self.mode.where()}: {reason}; use relevance fisher, which needs no rules"
        )


Rule = Callable[[Call], tuple[Any, Trace]]
"""From a call to its result, with the rule's gradient, and the result's trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleBook:
    """Which operation follows which rule."""

    operations: Mapping[str, Rule]
    """By the name of the function, method, operator or property."""
    in_place: Collection[Rule]
    """Rules that keep none of their arguments, so that the operation may change them."""
    activation: Rule
    """Of a module that is one activation as a whole."""
    activation_modules: Collection[type[nn.Module]]


INPUT, WEIGHT = Trace(), Trace(constant=True)


@dataclass(slots=True)
class RuleScope:
    """Starts the mode at the outermost forward and keeps its path through the modules."""

    switch: PassSwitch
    book: RuleBook
    mode: OperationMode | None = None

    def wrapped(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """The module's forward, followed while gradients are enabled."""
        original: Callable[..., Any] = module.forward
        path = described(name, module)
        # One that may work in place is followed operation by operation.
        composed = type(module) in self.book.activation_modules and not getattr(module, "inplace", False)

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return original(*args, **kwargs)
            if self.mode is not None:
                return self.mode.inside(path, original, args, kwargs, composed)
            self.mode = OperationMode(self.switch, self.book, (args, kwargs))
            try:
                with self.mode:
                    return self.mode.inside(path, original, args, kwargs, composed)
            finally:
                self.mode = None

        return forward


class OperationMode(TorchFunctionMode):
    """Applies the rules during one forward, and knows the traces of its tensors."""

    def __init__(self, switch: PassSwitch, book: RuleBook, inputs: Any) -> None:
        super().__init__()
        self.switch = switch
        self.book = book
        self._traces: dict[tuple[Any, int], Trace] = {}
        self._path: list[str] = []
        self._paused = False
        self._note(inputs, INPUT)

    def where(self) -> str:
        """The module whose forward is running, in words."""
        return f"in {self._path[-1]}"

    def inside(
        self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], composed: bool
    ) -> Any:
        """Run a module's forward: as one activation, or operation by operation."""
        self._path.append(path)
        paused, self._paused = self._paused, self._paused or composed
        try:
            output = (
                self._apply(forward, args, kwargs, self.book.activation)[0] if composed else forward(*args, **kwargs)
            )
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
        rule = self.book.operations.get(name)
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

    def trace(self, x: Tensor) -> Trace:
        """Trace of a tensor that requires a gradient."""
        found = self._traces.get(key_of(x))
        if found is not None:
            return found
        if isinstance(x, nn.Parameter):
            return WEIGHT
        maker = "nobody: it is a leaf" if x.grad_fn is None else x.grad_fn.name()
        raise ModelError(
            f"a tensor {self.where()} was made by {maker}, where no torch function was seen: expected no custom "
            "autograd function, no compiled or scripted code, no view of a tensor that was changed in place elsewhere; "
            "use relevance fisher, which needs no rules"
        )

    def _note(self, tensors: Any, trace: Trace) -> None:
        for x in _differentiable(tensors):
            self._traces[key_of(x)] = trace

    def _apply(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], rule: Rule | None
    ) -> tuple[Any, Trace | None]:
        """Result and its trace; no trace if the operation has no rule and needs none."""
        live = [x for x in _differentiable((args, kwargs)) if not self.trace(x).constant]
        call = Call(self, function, args, kwargs, live)
        if not live:
            result, trace = call.native(), WEIGHT
        elif rule is not None:
            result, trace = rule(call)
        else:
            result, trace = call.native(), None
            if any(key_of(x) not in self._traces for x in _differentiable(result)):
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
        if rule is None or rule in self.book.in_place:
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
            self._note(target._base, Trace(constant=trace.constant))
            self._note(target, replace(trace, origin=None))
        return result


def key_of(x: Tensor) -> tuple[Any, int]:
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


def described(name: str, module: nn.Module) -> str:
    """A module's path and class, in words."""
    return f"module {name or '(root)'} of class {type(module).__name__}"
