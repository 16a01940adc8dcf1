"""BlockStream: a model whose decoder blocks are in memory one at a time.

The model is built on the meta device. What a block is called with (masks, rotary tables, positions) is recorded by
running the model's own forward with every block replaced by a recorder, so no architecture's forward is written again.
While one block computes, the next one's weights are read by a background thread, and brought to a GPU beside what it
computes.

Names of modules are the model's, as transformers has them; names of tensors on disk can differ (lrpq.model.names).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lrpq.errors import ModelError
from lrpq.model.experts import expert_tensors, replace_experts
from lrpq.model.families import family_of
from lrpq.model.file_reads import FileReads
from lrpq.model.inputs import image_arguments, text_arguments
from lrpq.model.layers import LinearSpec
from lrpq.model.linears import find_head, find_linears
from lrpq.model.names import check_shapes, stored_names, tie
from lrpq.model.places import find_blocks
from lrpq.model.recording import BlockCall, Recorded, recording
from lrpq.model.safetensors_source import ModelSource
from lrpq.model.skeleton import build_skeleton, own_modules
from lrpq.model.staging import Event, Staging

if TYPE_CHECKING:
    from jaxtyping import Float, Int

STEP_BYTES = 512 << 20
Overrides = Mapping[str, Tensor]
"""Module name -> weight [d_out, d_in] that replaces the one on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moving:
    """Weights that are read."""

    tensors: dict[str, Tensor]
    """On the device; there whole when the event has happened."""
    as_stored: frozenset[str]
    """Those of which no digit was rounded on the way."""
    arrived: Event | None
    """Of the last of them, in whose order the others were copied; None where nothing is waited for."""


class BlockStream:
    """A causal language model or an image classifier of which at most one block has its weights in memory.

    Args:
        source: where the weights are.
        dtype: dtype of weights and activations.
        device: where blocks compute.
        attention: name of the attention implementation registered with transformers; by default its choice for the
            architecture.
        prefetch: read the next block while this one computes (the device's memory then holds two blocks' weights).
        low_memory: the next block's weights wait in host memory, where they are not needed on the device yet.
        threads: that read weights for a GPU; they change no value.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        attention: str | None = None,
        prefetch: bool = True,
        low_memory: bool = False,
        threads: int = 1,
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.device = torch.device(device)
        self.prefetch = prefetch
        self.low_memory = low_memory
        self._staging = Staging(self.device) if self.device.type == "cuda" else None
        self._reads = (
            FileReads(source=source, staging=self._staging, threads=threads)
            if self._staging is not None and threads > 1
            else None
        )
        self.architecture, self.family = family_of(source.config)
        self.model: Any = build_skeleton(source.config, dtype=dtype, device=self.device, attention=attention)
        self.tied_head = self.family.pooling is None and bool(source.config.tie_word_embeddings)
        self._stored: dict[str, tuple[str, ...]] = {
            name: (stored,) for name, stored in stored_names(self.model, source).items()
        }
        places = find_blocks(self.model, self.family)
        own_modules(self.model, (self.family.head,))
        self._outside = own_modules(self.model, self.family.outside, self.family.optional)
        self._tail = own_modules(self.model, self.family.tail, self.family.optional)
        if not places:
            raise ModelError(f"model {source.folder}: config.json describes a model without decoder blocks")
        self.block_names: tuple[str, ...] = tuple(place.path for place in places)
        self.blocks: tuple[nn.Module, ...] = tuple(place.module for place in places)
        self._replace_experts()
        if self.tied_head:
            tie(self._stored, f"{self.family.head}.weight", f"{self._outside[0]}.weight")
        parts = (*self._outside, *self.block_names, *self._tail, self.family.head)
        check_shapes({path: self.model.get_submodule(path) for path in parts}, self._stored, source)
        self.specs: tuple[LinearSpec, ...] = tuple(find_linears(places, self.family, self._stored, source))
        self._by_block: dict[int, list[LinearSpec]] = {}
        for spec in self.specs:
            self._by_block.setdefault(spec.block, []).append(spec)
        self._calls: dict[tuple[int, int, int], BlockCall] = {}
        self._lengths: dict[tuple[int, int], int] = {}
        self._present: dict[tuple[str, ...], Tensor] = {}
        """Weights of the block in memory that are as they are stored, by their names on disk."""
        self._embedding_held = False

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def head_spec(self) -> LinearSpec | None:
        """The head as one more layer; None where its weight is the embedding's.

        Not among ``specs``, which lie in blocks: what quantizes the head asks for it.

        Raises:
            ModelError: the weight on disk is not what config.json describes.
        """
        if self.tied_head:
            return None
        return find_head(self.model, self.family, self._stored, self.source, block=self.num_blocks)

    def block_specs(self, block: int) -> tuple[LinearSpec, ...]:
        """Linear layers of one block, in the order of execution."""
        return tuple(self._by_block.get(block, ()))

    def sites(self, block: int) -> dict[str, tuple[LinearSpec, ...]]:
        """Input site -> linear layers that read it, in the order of execution."""
        found: dict[str, list[LinearSpec]] = {}
        for spec in self.block_specs(block):
            found.setdefault(spec.input_site, []).append(spec)
        return {site: tuple(members) for site, members in found.items()}

    def steps(self, block: int) -> list[tuple[LinearSpec, ...]]:
        """Layers of a block whose inputs are found in one forward, in the order of execution.

        A site is a step. Experts of a block do not read each other's outputs, so many of their sites share a step: as
        many as have sums C and D of ``STEP_BYTES`` together. The merge tree of n shards holds them log2(n) + 1 times.
        """
        found: list[list[LinearSpec]] = []
        held = 0
        for spec in self.block_specs(block):
            size = 2 * 4 * spec.d_in * spec.d_in
            last = found[-1][-1] if found else None
            same_site = last is not None and last.input_site == spec.input_site
            beside = last is not None and last.routed and spec.routed and last.kind == spec.kind
            if same_site or (beside and held + size <= STEP_BYTES):
                found[-1].append(spec)
            else:
                found.append([spec])
                held = 0
            held += 0 if same_site else size
        return [tuple(step) for step in found]

    def local_name(self, spec: LinearSpec) -> str:
        """Module name inside its block, e.g. ``self_attn.q_proj``."""
        return spec.name.removeprefix(f"{self.block_names[spec.block]}.")

    def stored(self, name: str) -> tuple[str, ...]:
        """Names on disk of a tensor of the model; their rows, one after the other, make it."""
        return self._stored.get(name, (name,))

    def weight(self, spec: LinearSpec) -> Float[Tensor, "d_out d_in"]:
        """One layer's weights as stored, as float32 on the computing device, in memory of their own.

        They are read, unless the layer's block is in memory with the digits and the weights that are on disk.
        """
        present = self._present.get(spec.stored)
        if present is not None:
            return present.to(torch.float32, copy=True)
        return self.source.read_rows(spec.stored).to(self.device).to(torch.float32)  # a GPU converts faster

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Keep the embeddings in memory for several calls of ``embed``."""
        with self._materialised(self._outside):
            self._embedding_held = True
            try:
                yield
            finally:
                self._embedding_held = False

    def num_labels(self, inputs: Tensor) -> int:
        """What the head decides for a batch: one label a token, or one an image."""
        return inputs.numel() if self.family.pooling is None else len(inputs)

    @torch.no_grad()
    def embed(
        self, inputs: Int[Tensor, "n t"] | Float[Tensor, "n channels height width"]
    ) -> Float[Tensor, "n t hidden"]:
        """Input of the first block. Also records what each block is called with for this shape of batch.

        Args:
            inputs: token ids; of an image classifier, preprocessed images.

        Raises:
            CalibrationError: the images do not have the size that the model reads.
        """
        if self.family.pooling is None:
            arguments = text_arguments(inputs.to(self.device))
        else:  # not every model brings images to its own dtype
            arguments = image_arguments(inputs.to(self.device, self.dtype), self.source.config)
        with nullcontext() if self._embedding_held else self._materialised(self._outside):
            recorded: list[BlockCall] = []
            with recording(self.blocks, recorded):
                try:
                    self.model(**arguments)
                except Recorded as stop:
                    stop.__traceback__ = None  # its frames hold the embedding, in a cycle until the next collection
                    hidden = stop.hidden
        for block, call in enumerate(recorded):
            self._calls[block, hidden.shape[0], call.length] = call
            self._lengths[block, call.length] = hidden.shape[1]
        return hidden

    def num_tokens(self, block: int, hidden: Float[Tensor, "n t hidden"]) -> int:
        """Tokens at the first block of the windows whose hidden states at a block these are.

        Costs are means over them whatever the block: where patches are merged, a later token stands for several.
        """
        return len(hidden) * self._lengths[block, hidden.shape[1]]

    def call_arguments(self, block: int, shape: tuple[int, int]) -> dict[str, Any]:
        """Keyword arguments of one block's forward for a batch of ``shape`` (sequences, tokens at this block).

        Raises:
            KeyError: no batch of this shape has been embedded yet.
        """
        return self._calls[block, *shape].arguments

    def run(self, module: nn.Module, block: int, hidden: Float[Tensor, "n t hidden"]) -> Float[Tensor, "n t hidden"]:
        """Forward of a materialised block."""
        output = module(hidden, **self.call_arguments(block, (hidden.shape[0], hidden.shape[1])))
        return cast("Tensor", output[0] if isinstance(output, tuple) else output)

    def stream(
        self, order: Sequence[int], overrides: Mapping[int, Overrides] | None = None
    ) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, block) with weights in memory; the weights are gone when another block is asked for.

        Args:
            order: indices of blocks, in the order in which they are wanted; a block that follows itself, as where a
                walk turns, is read once.
            overrides: per block, weights that replace those on disk.
        """
        with ThreadPoolExecutor(max_workers=1) as reader:
            upcoming: Future[_Moving | dict[str, Tensor]] | None = None
            read: Callable[[int], _Moving | dict[str, Tensor]] = (
                self._read_block if self.low_memory else self._bring_block
            )
            try:
                walk = [(index, len(list(times))) for index, times in groupby(order)]
                for position, (index, times) in enumerate(walk):
                    weights = self._arrived(upcoming.result() if upcoming is not None else self._bring_block(index))
                    upcoming = None
                    if self.prefetch and position + 1 < len(walk):
                        upcoming = reader.submit(read, walk[position + 1][0])
                    with self._with_weights(index, weights, (overrides or {}).get(index, {})) as block:
                        del weights
                        for _ in range(times):
                            yield index, block
            finally:
                if upcoming is not None and upcoming.exception() is None:  # not wanted any more
                    unwanted = upcoming.result()
                    if isinstance(unwanted, _Moving):
                        self._arrived(unwanted)

    @contextmanager
    def block(self, index: int, overrides: Overrides | None = None) -> Iterator[nn.Module]:
        """One block with weights in memory for the length of the context."""
        with self._with_weights(index, self._arrived(self._bring_block(index)), overrides or {}) as block:
            yield block

    @contextmanager
    def swapped(self, module: nn.Module, weights: Overrides) -> Iterator[None]:
        """Replace some layers' weights of a materialised block for the length of the context."""
        with _replaced((module.get_submodule(self._in_block(name)), weight) for name, weight in weights.items()):
            yield

    @contextmanager
    def head(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """What follows the last block, with weights in memory for the length of the context.

        Yields:
            The final norm (with what else lies between the last block and the head, such as pooling), and the function
            from its output [..., h] to logits [..., vocabulary or classes].
        """
        with self._materialised((*self._tail, self.family.head)):
            tail = [self.model.get_submodule(path) for path in self._tail]
            if self.family.pooling is not None:
                tail.append(self.family.pooling())
            head = self.model.get_submodule(self.family.head)
            yield tail[0] if len(tail) == 1 else nn.Sequential(*tail), self._capped(head)

    @contextmanager
    def swapped_head(self, weights: Overrides) -> Iterator[None]:
        """Replace the head's weight, if it is among ``weights``, inside ``head()``."""
        with _replaced((self.model.get_submodule(name), weight) for name, weight in weights.items()):
            yield

    def _in_block(self, name: str) -> str:
        (path,) = (path for path in self.block_names if name.startswith(f"{path}."))
        return name.removeprefix(f"{path}.")

    def _capped(self, head: nn.Module) -> Callable[[Tensor], Tensor]:
        field = self.family.logit_cap
        cap = None if field is None else getattr(self.source.config.get_text_config(), field, None)
        if cap is None:
            return head
        return lambda hidden: torch.tanh(head(hidden) / cap) * cap

    def _replace_experts(self) -> None:
        layout = self.family.experts
        if layout is None:
            return
        for index, block in enumerate(self.blocks):
            name = self.block_names[index]
            experts = replace_experts(block, layout.path, name=name)
            if experts is not None:
                parts = expert_tensors(
                    f"{name}.{layout.path}", experts.num_experts, gate_up=layout.gate_up, down=layout.down
                )
                self._stored |= {
                    weight: tuple(stored for part in names for stored in self._on_disk(part))
                    for weight, names in parts.items()
                }

    def _on_disk(self, name: str) -> tuple[str, ...]:
        """Tensors of an expert's projection; renaming knows no prefix of names that the model itself does not have."""
        bare = name.removeprefix(f"{self.model.base_model_prefix}.")
        return self._stored.get(name) or self._stored.get(bare) or (name,)

    def _bring_block(self, index: int) -> _Moving:
        return self._bring(*self._place(index))

    def _read_block(self, index: int) -> dict[str, Tensor]:
        return dict(self._read(*self._place(index)))

    def _place(self, index: int) -> tuple[str, Iterable[str]]:
        return f"{self.block_names[index]}.", self.blocks[index].state_dict()

    def _read(self, prefix: str, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors in host memory by their names without the prefix, one after the other."""
        return ((name, self.source.read_rows(self.stored(prefix + name))) for name in names)

    def _bring(self, prefix: str, names: Iterable[str]) -> _Moving:
        """Tensors on their way to the device by their names without the prefix."""
        wanted = {name: self.stored(prefix + name) for name in names}
        if self._reads is None or not all(self._reads.can_read(parts, self.dtype) for parts in wanted.values()):
            return self._brought(self._read(prefix, wanted))
        tensors, arrived = self._reads.bring(wanted)
        return _Moving(tensors=tensors, as_stored=frozenset(tensors), arrived=arrived)

    def _brought(self, weights: Iterable[tuple[str, Tensor]]) -> _Moving:
        """Tensors on their way to the device."""
        host: dict[str, Tensor] = {}
        as_stored: set[str] = set()
        for name, x in weights:
            if x.dtype == self.dtype:
                as_stored.add(name)
            host[name] = x.to(self.device, self.dtype) if self._staging is None else x.to(self.dtype).contiguous()
        if self._staging is None:
            return _Moving(tensors=host, as_stored=frozenset(as_stored), arrived=None)
        tensors = {name: torch.empty(x.shape, dtype=self.dtype, device=self.device) for name, x in host.items()}
        ready = self._staging.now()  # once for all: what the device is asked to do meanwhile need not be waited for
        arrived: Event | None = None
        try:
            for name, x in host.items():
                arrived = self._staging.to_device(x, tensors[name], ready)
        except BaseException:
            self._staging.finish()  # the memory may only be given up when nothing is written to it any more
            raise
        return _Moving(tensors=tensors, as_stored=frozenset(as_stored), arrived=arrived)

    def _arrived(self, weights: _Moving | Mapping[str, Tensor]) -> _Moving:
        moving = weights if isinstance(weights, _Moving) else self._brought(weights.items())
        if self._staging is not None and moving.arrived is not None:
            self._staging.wait(moving.arrived)
        return moving

    @contextmanager
    def _with_weights(self, index: int, arrived: _Moving, overrides: Overrides) -> Iterator[nn.Module]:
        block, weights = self.blocks[index], arrived.tensors
        prefix = f"{self.block_names[index]}."
        replaced = {name.removeprefix(prefix) + ".weight": weight for name, weight in overrides.items()}
        for name, weight in replaced.items():
            weights[name] = weight.to(self.device, self.dtype)
        try:
            _assign(block, weights)
            self._present = {self.stored(prefix + name): weights[name] for name in arrived.as_stored - set(replaced)}
            yield block
        finally:
            self._present = {}
            _empty(block)

    @contextmanager
    def _materialised(self, modules: Sequence[str]) -> Iterator[None]:
        try:
            for path in modules:
                module = self.model.get_submodule(path)
                _assign(module, self._arrived(self._bring(f"{path}.", module.state_dict())).tensors)
            yield
        finally:
            for path in modules:
                _empty(self.model.get_submodule(path))


@contextmanager
def _replaced(weights: Iterable[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    originals: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer, weight in weights:
            parameter = layer.get_parameter("weight")
            originals.append((parameter, parameter.data))
            parameter.data = weight.to(parameter.device, parameter.dtype)
        yield
    finally:
        for parameter, original in originals:
            parameter.data = original


def _assign(module: nn.Module, weights: dict[str, Tensor]) -> None:
    module.load_state_dict(weights, strict=True, assign=True)
    module.requires_grad_(False)


def _empty(module: nn.Module) -> None:
    """Give the weights' memory back; buffers that were computed stay, for nobody computes them again."""
    computed = [(m, name, getattr(m, name)) for m in module.modules() for name in m._non_persistent_buffers_set]
    module.to("meta")
    for owner, name, buffer in computed:
        setattr(owner, name, buffer)
