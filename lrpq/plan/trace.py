"""One decoder block run without values: the model's own code, and the rules', on tensors that have shapes only.

FLOPs, bytes written and the most bytes alive at once are read off the operations as they come by. Where a fused kernel
would run on a real device, the meta device would fall back to its formula, whose matrix of scores does not exist there:
attention is replaced by a kernel that allocates what a fused one does. Routing depends on values: here every expert
gets an equal share of the tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lrpq.model.experts import Expert, LinearExperts
from lrpq.model.recording import BlockCall, Recorded, recording
from lrpq.model.streaming import BlockStream
from lrpq.relevance.head import nll_seed, sample_labels
from lrpq.relevance.passes import rules_for, run_passes, widen
from lrpq.relevance.rules import Pass, PassSwitch

META = torch.device("meta")
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What some operations took."""

    flops: float
    """Of matrix products, attention among them."""
    vector_bytes: float
    """Written by everything else."""
    peak_bytes: float
    """Most bytes alive at once, those of what went in left out."""
    kept_bytes: float
    """Still alive at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTrace:
    """One micro-batch through one block."""

    forward: Traced
    """Without gradients."""
    backward: Traced
    """Recomputed with a gradient on the input, then one backward pass for each pass."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up FLOPs and written bytes, and follows which storages are alive."""

    def __init__(self, given: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0
        self.vector_bytes = 0.0
        self.alive = 0
        self.peak = 0
        self._given = [x.untyped_storage() for x in given if isinstance(x, Tensor)]
        self._sizes: dict[int, int] = {storage._cdata: 0 for storage in self._given}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        found = flop_registry.get(packet)
        if found is not None:
            self.flops += found(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                new = self._follow(tensor)
                if found is None and (new or packet.__name__.endswith("_")):
                    self.vector_bytes += tensor.numel() * tensor.element_size()
        return out

    def _follow(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        self._sizes[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key)
        return True

    def _gone(self, key: int) -> None:
        self.alive -= self._sizes.pop(key, 0)

    def traced(self) -> Traced:
        return Traced(
            flops=self.flops, vector_bytes=self.vector_bytes, peak_bytes=float(self.peak), kept_bytes=float(self.alive)
        )


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: its inputs, its output and one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, watch: _Watch) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.watch = watch
        watch.flops += sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        shapes = gradients[0].shape, query.shape, key.shape, value.shape
        ctx.watch.flops += sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


@contextmanager
def _fused(watch: _Watch) -> Iterator[None]:
    original = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
        if options.get("enable_gqa") and key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
        result: Tensor = _FusedAttention.apply(query, key, value, watch)  # type: ignore[no-untyped-call]
        return result

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def _even(module: LinearExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``LinearExperts.forward`` with as many tokens for each expert."""
    output = torch.zeros_like(hidden)
    share = min(-(-hidden.shape[0] * top_k_index.shape[1] // module.num_experts), hidden.shape[0])
    rows = torch.empty(share, dtype=torch.long, device=hidden.device)
    for expert in module.children():
        if isinstance(expert, Expert):
            gate, up = expert.gate_up_proj(hidden[:share].clone()).chunk(2, dim=-1)
            y = expert.down_proj(module.gated(gate, up))
            output.index_add_(0, rows, module.weighted(y, top_k_weights[:share, 0, None]).to(output.dtype))
    return output


@contextmanager
def _evenly_routed() -> Iterator[None]:
    """On the class: rules refuse a block in which an instance's forward is replaced."""
    original = LinearExperts.forward
    LinearExperts.forward = _even  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        LinearExperts.forward = original  # type: ignore[method-assign]


@torch.no_grad()
def recorded_arguments(stream: BlockStream, lengths: Sequence[int]) -> dict[int, list[Mapping[str, Any]]]:
    """What every block is called with for one window of so many tokens, by length, on the meta device.

    Found by the model's own forward from embeddings of zeros; moves the skeleton to the meta device.
    """
    found: dict[int, list[Mapping[str, Any]]] = {}
    width = stream.model.get_input_embeddings().weight.shape[-1]
    for length in dict.fromkeys(lengths):
        recorded: list[BlockCall] = []
        inputs = torch.zeros(1, length, width, dtype=stream.dtype)
        with recording(stream.blocks, recorded), _small_weights(stream):
            try:
                stream.model(inputs_embeds=inputs, use_cache=False, logits_to_keep=1)
            except Recorded as stop:
                stop.__traceback__ = None
        found[length] = [tree_map(_on_meta, dict(call.arguments)) for call in recorded]
    stream.model.to(META)
    return found


def _on_meta(value: Any) -> Any:
    return torch.empty_like(value, device=META) if isinstance(value, Tensor) else value


@contextmanager
def _small_weights(stream: BlockStream) -> Iterator[None]:
    """Give small modules before the first block (learned positions, projections) zeros as weights meanwhile."""
    given: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path in stream._outside[1:]:
        for module in stream.model.get_submodule(path).modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                given.append((module, name, parameter))
                setattr(module, name, nn.Parameter(torch.zeros_like(parameter, device="cpu"), requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in given:
            setattr(module, name, parameter)


def trace_block(
    stream: BlockStream, block: int, arguments: Mapping[str, Any], *, windows: int, length: int, passes: Sequence[Pass]
) -> BlockTrace:
    """Run one block on ``windows`` windows, forward and backward, as the profile does."""
    width = stream.source.config.get_text_config().hidden_size
    shape = (windows, length, width)
    return _traced(stream.blocks[block], arguments, shape, dtype=stream.dtype, passes=passes)


def trace_llama(config: LlamaConfig, *, windows: int, length: int, passes: Sequence[Pass]) -> BlockTrace:
    """The same of a Llama's block in bfloat16."""
    with META:
        block = LlamaDecoderLayer(config, layer_idx=0).to(torch.bfloat16).eval().requires_grad_(False)
        table = torch.empty(1, length, config.hidden_size // config.num_attention_heads, dtype=torch.bfloat16)
    arguments = {"position_embeddings": (table, table), "attention_mask": None}
    shape = (windows, length, config.hidden_size)
    return _traced(block, arguments, shape, dtype=torch.bfloat16, passes=passes)


def _traced(
    module: nn.Module,
    arguments: Mapping[str, Any],
    shape: tuple[int, int, int],
    *,
    dtype: torch.dtype,
    passes: Sequence[Pass],
) -> BlockTrace:
    given = [*module.parameters(), *module.buffers(), *tree_leaves(dict(arguments))]
    with _evenly_routed():
        with _Watch(given) as watch, _fused(watch), torch.no_grad():
            hidden = torch.empty(shape, dtype=dtype, device=META)
            before = watch.alive
            output = module(hidden, **arguments)
            watch.peak -= before
            forward = watch.traced()
            del output, hidden
        switch = PassSwitch()
        with _Watch(given) as watch, _fused(watch):
            upstream = {running: torch.empty(shape, dtype=dtype, device=META) for running in passes}
            before = watch.alive
            with rules_for(module, switch, passes), torch.enable_grad():
                leaf = torch.empty(shape, dtype=dtype, device=META).requires_grad_()
                out = module(leaf, **arguments)
                out = out[0] if isinstance(out, tuple) else out
            gradients = run_passes(out, leaf, upstream, switch)
            watch.peak -= before
            backward = watch.traced()
            del gradients, out, leaf, upstream
    return BlockTrace(forward=forward, backward=backward)


def trace_labels(hidden: int, vocabulary: int, *, dtype: torch.dtype, tokens: int) -> Traced:
    """Logits of ``tokens`` tokens, labels sampled from them and the gradient back at the head's input."""
    head = nn.Linear(hidden, vocabulary, bias=False, dtype=dtype, device=META).requires_grad_(False)
    given = list(head.parameters())
    generator = torch.Generator("cpu").manual_seed(0)
    with _Watch(given) as watch:
        with torch.enable_grad():
            z = torch.empty(tokens, hidden, dtype=dtype, device=META).requires_grad_()
            logits = head(z)
        wide = widen(logits.detach())
        chunk = sample_labels(wide, generator)
        nats = wide.logsumexp(-1) - wide.gather(-1, chunk.unsqueeze(-1)).squeeze(-1)
        seed = nll_seed(wide, chunk)
        torch.autograd.grad(logits, z, seed.to(dtype))
        del nats
    result: Traced = watch.traced()
    return result
