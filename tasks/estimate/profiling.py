"""The profile's load."""

from __future__ import annotations

from lrpq.plan import kernels
from lrpq.plan.work import Work, matmul, total, work
from lrpq.relevance.head import LABEL_RUN
from tasks.estimate.common import Common
from tasks.estimate.load import Load
from tasks.estimate.model import BlockKind
from tasks.estimate.objects import hessian_bytes


class Profiling(Common):
    """Of the profile."""

    def profile(self) -> Load:
        """Forward sweep, labels, backward sweep; the sums of the Hessians on the one way or the other."""
        shape, asked = self.shape, self.asked
        explained = asked.explained_share
        passes = len(asked.relevance.passes)
        one = total(self._profile_block(kind) * kind.count for kind in shape.kinds)
        labels = self._labels(self.windows * asked.length * explained)
        merging = total(work(wide=3 * kind.sums_bytes * kind.count) for kind in shape.kinds)
        stored = sum(
            kind.count * sum(map(hessian_bytes, [*(m[0].d_in for m in kind.sites().values()), *kind.chunks]))
            for kind in shape.kinds
        )
        storing = work(matrix_write=stored)
        twice = 2.0 - 1 / shape.num_blocks  # the last block is read once for both ways
        reading = work(disk_read=twice * sum(kind.disk_bytes * kind.count for kind in shape.kinds))
        tokens = self.windows * asked.length
        state = tokens * shape.hidden * shape.itemsize
        kept = state * shape.num_blocks * explained
        in_memory = min(kept, self.kept_bytes)
        widest = max(spec.d_in for spec in shape.specs)
        batch = self.micro_batch * asked.length
        backward = max(kind.calibration.backward.peak_bytes for kind in shape.kinds)
        accumulating = 8.0 * batch * widest
        at_work = self.at_work(tokens)
        # of the block before, upper triangles are on their way to the host while the first shard of this one is summed
        leaving = 0 if self.cpu or not asked.weighs_tokens else self.set_bytes // 2
        sums, computing = max(self.levels * self.set_bytes, self.set_bytes + leaving), backward + accumulating
        if asked.low_memory:  # one set while a micro-batch computes, two while they are merged
            sums = self.set_bytes if computing > self.set_bytes else min(self.levels, 2) * self.set_bytes
            computing = computing if computing > self.set_bytes else 0.0
        at_block = {
            "weights of two blocks": self.blocks_at_once(2) * self.block_bytes,
            "gradients between blocks": passes * state * min(explained, at_work),
            "one micro-batch": computing,
            "sums of Hessians": float(sums),
        }
        at_labels = {
            "weights of two blocks": self.blocks_at_once(2) * self.block_bytes,
            "head": float(shape.head_bytes),
            "logits": shape.labels.peak_bytes,
            "hidden states": (1 + passes * explained) * state * at_work,
        }
        embedding = {"embeddings": float(shape.embedding_bytes), "hidden states": 2 * state * at_work}
        waiting = {"gradients and hidden states": (1 + passes * explained) * state} if asked.low_memory else {}
        worst = max((at_block, at_labels, embedding), key=lambda found: sum(found.values()))
        merged = {"sums on their way to the store": 2.0 * self.set_bytes + self.writing(shape)}
        return Load(
            work=one * (asked.num_windows / self.windows) + self._labels(asked.tokens * explained) + merging + storing,
            busiest=one + labels + merging * (1 / self.num_workers) + storing * (1 / self.num_workers) + reading,
            tensors=worst,
            host={"kept block inputs": in_memory, **waiting, **merged},
            spilled_bytes=max(kept - in_memory, 0.0),
            network_bytes=float(self.active * sum(kind.sums_bytes * kind.count for kind in shape.kinds)),
            steps=2 * shape.num_blocks + 1,
        )

    def _profile_block(self, kind: BlockKind) -> Work:
        asked, shape = self.asked, self.shape
        batches = self.windows / self.micro_batch
        tokens = self.windows * asked.length
        passes, explained = len(asked.relevance.passes), asked.explained_share
        traced = self.of_trace(kind.calibration.forward) + self.of_trace(kind.calibration.backward) * explained
        sums = []
        for members in kind.sites().values():
            seen = tokens * shape.share(members[0])
            sums.append(kernels.accumulate(members[0].d_in, seen, split=self.split))
            if asked.weighs_tokens:
                sums += [kernels.add_outputs(s.d_out, seen, split=self.split) for s in members if not s.routed]
            sums.append(work(wide=8.0 * passes * seen * explained * sum(spec.d_out for spec in members)))
        return traced * batches + total(sums)

    def _labels(self, tokens: float) -> Work:
        shape = self.shape
        times = tokens / min(self.asked.label_tokens, self.asked.length)
        products = matmul(4.0 * tokens * shape.hidden * shape.vocabulary, dtype=self.dtype, width=shape.hidden)
        bytes_written = work(vector=shape.labels.vector_bytes * times)
        return products + bytes_written + kernels.sample_labels(tokens, shape.vocabulary, run=LABEL_RUN)
