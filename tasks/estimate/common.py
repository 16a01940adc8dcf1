"""What the stages of a compression have in common: who computes, on how much, in what pieces."""

from __future__ import annotations

from math import ceil

import torch

from lrpq.allocate.trellis import takes_trellis, with_trellis
from lrpq.model.layers import Choice, LinearSpec
from lrpq.plan import kernels
from lrpq.plan.trace import Traced
from lrpq.plan.work import NOTHING, Work, matmul, work
from lrpq.quant import halves
from lrpq.shards import assign
from tasks.estimate.asked import Asked
from tasks.estimate.model import ModelShape
from tasks.store.symmetric import TILES_PER_GROUP
from tasks.store.tiles import TILE

TILE_BYTES = 4 * TILE * TILE
ROW_GROUPS_BYTES = 5 * TILES_PER_GROUP * TILE_BYTES
"""Most that writing a matrix to the store holds beside it: five row groups (tasks/store/symmetric.py)."""


class Common:
    """Of one compression.

    Args:
        shape: the model.
        asked: the job.
        num_workers: workers.
        cpu: they compute on CPUs.
        kept_bytes: what a worker may fill with kept inputs.
    """

    def __init__(self, shape: ModelShape, asked: Asked, *, num_workers: int, cpu: bool, kept_bytes: int) -> None:
        self.shape, self.asked, self.cpu, self.kept_bytes = shape, asked, cpu, kept_bytes
        self.num_workers = num_workers
        self.dtype = str(asked.dtype).removeprefix("torch.")
        windows = [ceil(asked.num_windows * len(r) / asked.num_shards) for r in assign(asked.num_shards, num_workers)]
        self.windows = max(windows)
        """Of the worker that has most."""
        self.active = sum(n > 0 for n in windows)
        """Workers with any."""
        self.set_bytes = max(kind.sums_bytes for kind in shape.kinds)
        self.block_bytes = max(kind.num_bytes for kind in shape.kinds)
        per_shard = ceil(asked.num_windows / asked.num_shards)
        self.micro_batch = min(asked.micro_batch, per_shard)
        shards = max(len(r) for r in assign(asked.num_shards, num_workers))
        self.levels = max(shards - 1, 0).bit_length() + 1
        """Sets of sums that the merge tree holds at once."""

    def at_work(self, tokens: float) -> float:
        """Share of the streams that is on the device: in low memory two micro-batches of them."""
        return min(1.0, 2 * self.micro_batch * self.asked.length / max(tokens, 1)) if self.asked.low_memory else 1.0

    def blocks_at_once(self, number: int) -> float:
        """Blocks' weights on the device: in low memory the next one's wait."""
        return float(number - 1 if self.asked.low_memory else number)

    def writing(self, shape: ModelShape) -> float:
        """Row groups while the widest matrix is written."""
        widest = max(spec.d_in for spec in shape.specs)
        across = ceil(widest / TILE)
        tiles = across * (across + 1) // 2
        return float(min(ROW_GROUPS_BYTES, 5 * tiles * TILE_BYTES))

    @property
    def split(self) -> bool:
        """Whether sums over activations are products in bfloat16."""
        return not self.cpu and self.asked.dtype is torch.bfloat16

    def rounded_sum(self, flops: float, width: int) -> Work:
        """Products of what the quantized stream lacks."""
        return kernels.activation_sum(flops, width=width, split=self.split, rounded=True)

    def of_trace(self, traced: Traced) -> Work:
        """What was traced, in the model's dtype."""
        return matmul(traced.flops, dtype=self.dtype, width=self.shape.hidden) + work(vector=traced.vector_bytes)

    def fitting(self, spec: LinearSpec) -> list[Choice]:
        """The choices that a layer has."""
        return [choice for choice in self.asked.choices if choice.fits(spec.d_in)]

    def refined_choice(self, spec: LinearSpec) -> Choice:
        """A choice near the budget: what the allocation takes on the average."""
        fitting = self.fitting(spec)
        return min(fitting, key=lambda c: abs(c.bits + 16 / (spec.d_in / c.groups(spec.d_in)) - self.asked.budget_bits))

    def planned_choice(self, spec: LinearSpec) -> Choice:
        """The same with the kind of codes that is asked for."""
        choice = self.refined_choice(spec)
        return with_trellis(choice) if self.asked.trellis and takes_trellis(spec) else choice

    def decoding(self) -> Work:
        """What dequantizing the plan's codes takes beyond that of uniform codes, all layers."""
        found = NOTHING
        for kind in self.shape.kinds:
            for spec in kind.specs if self.asked.trellis else ():
                choice, size = self.planned_choice(spec), (spec.d_out, spec.d_in)
                uniform = kernels.dequantize(*size, itemsize=self.shape.itemsize)
                more = kernels.dequantize(*size, itemsize=self.shape.itemsize, choice=choice) + -1.0 * uniform
                found += more * kind.count
        return found

    def sweep_bytes(self, d_in: int, stacked: int) -> float:
        """Of the column loop: errors and codes of some rows; on a GPU also errors by halves, and of the factor the part
        that a product takes."""
        if self.cpu:
            return 9.0 * d_in * stacked
        return 11.0 * d_in * stacked + 6.0 * (d_in if d_in <= halves.SPLIT_WHOLE else d_in / 2) ** 2

    def streams_bytes(self, d_in: int, stacked: int) -> float:
        """The same of trellis codes, of all rows at once: errors, the weights in another unit, codes."""
        return 9.0 * d_in * stacked
