"""Loads of what follows the codes: scores, and the checkpoint."""

from __future__ import annotations

from lrpq.checkpoint.verify import PROBE_TOKENS
from lrpq.evaluate.divergence import rows_compared
from lrpq.plan import kernels
from lrpq.plan.work import matmul, total, work
from lrpq.shards import assign
from tasks.estimate.common import Common
from tasks.estimate.load import Load

LOAD_SECONDS = 1.5
"""Least that transformers takes to load a model, however small: about 1 s on one core, and its first forward."""
MAPPED = "its files, mapped"
"""Resident, and given back by the system where others need the memory."""


class Finishing(Common):
    """Of scores and assembly."""

    def score(self, windows: int, length: int, variants: int, *, held_out: bool) -> Load:
        """The original and the variants, the first of them the plan, on windows, one at a time; every worker streams
        all blocks."""
        shape = self.shape
        mine = max(len(r) for r in assign(windows, self.num_workers))
        models = 1 + variants
        forward = total(
            self.of_trace((kind.held_out if held_out else kind.measured).forward) * kind.count for kind in shape.kinds
        )
        logits = matmul(2.0 * length * shape.hidden * shape.vocabulary, dtype=self.dtype, width=shape.hidden)
        one = (forward + logits + work(vector=26.0 * length * shape.vocabulary)) * models
        weights = total(
            kernels.dequantize(s.d_out, s.d_in, itemsize=shape.itemsize) * k.count for k in shape.kinds for s in k.specs
        )
        codes = shape.num_weights * self.asked.budget_bits / 8
        loading = weights * variants + self.decoding()
        loading += work(
            pack=shape.num_weights * variants,
            store_read=codes * variants,
            disk_read=sum(kind.disk_bytes * kind.count for kind in shape.kinds),
        )
        state = mine * length * shape.hidden * shape.itemsize
        at_block = {
            "weights of two blocks, and the block quantized": 3.0 * self.block_bytes,
            "hidden states": float((models + 1) * state),
            "one window": max((k.held_out if held_out else k.measured).forward.peak_bytes for k in shape.kinds),
        }
        at_head = {
            "head": float(shape.head_bytes),
            "hidden states": float(models * state),
            "logits of two models": 2.0 * length * shape.vocabulary * shape.itemsize,
            "log-probabilities": 20.0 * min(length, rows_compared(shape.vocabulary)) * shape.vocabulary,
        }
        return Load(
            work=one * windows + loading * min(self.num_workers, windows),
            busiest=one * mine + loading,
            tensors=max((at_block, at_head), key=lambda found: sum(found.values())),
            steps=1,
        )

    def assemble(self) -> Load:
        """One worker writes the checkpoint, loads it as a user would, and then the dense model beside it."""
        shape = self.shape
        num = shape.num_weights
        codes = num * self.asked.budget_bits / 8
        rest = shape.disk_bytes - sum(kind.disk_bytes * kind.count for kind in shape.kinds)
        output = codes + rest
        once = work(
            pack=5.0 * num,
            store_read=3 * codes,
            wide=(2 + 2 + 2) * shape.itemsize * num,
            disk_read=2.0 * shape.disk_bytes + 3.0 * output,
            disk_write=output,
        )
        probe = 2.0 * 2.0 * PROBE_TOKENS * (num + shape.hidden * shape.vocabulary)
        model = float(shape.num_parameters * shape.itemsize)
        widest = max(spec.num_weights for spec in shape.specs)
        once += self.decoding() + matmul(probe, dtype=self.dtype, width=PROBE_TOKENS)
        return Load(
            work=once,
            busiest=once,
            tensors={},
            host={
                "the whole model": model,
                MAPPED: float(shape.disk_bytes),
                "its codes while they are unpacked": codes,
                "one layer": 12.0 * widest,
            },
            fixed_seconds=2 * LOAD_SECONDS,
            steps=1,
        )
