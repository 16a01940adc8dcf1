"""Work and peak memory of every stage, on the worker that has the most to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil

import torch

from lrpq.checkpoint.verify import PROBE_TOKENS
from lrpq.evaluate.divergence import rows_compared
from lrpq.model.layers import Choice, LinearSpec
from lrpq.plan import kernels
from lrpq.plan.trace import Traced
from lrpq.plan.work import NOTHING, Work, matmul, total, work
from lrpq.quant import descent, gptq, halves
from lrpq.refine import quantize
from lrpq.refine.row_parts import row_parts
from lrpq.relevance.head import LABEL_RUN
from lrpq.shards import assign
from tasks.estimate.asked import Asked
from tasks.estimate.model import BlockKind, ModelShape
from tasks.estimate.objects import codes_bytes, hessian_bytes
from tasks.site_parts import NUM_PARTS, cut_sites, part_of
from tasks.store.symmetric import TILES_PER_GROUP
from tasks.store.tiles import TILE

POLISH_SWEEPS = 2
"""Default of ``polish``."""
TILE_BYTES = 4 * TILE * TILE
ROW_GROUPS_BYTES = 5 * TILES_PER_GROUP * TILE_BYTES
"""Most that writing a matrix to the store holds beside it: five row groups (tasks/store/symmetric.py)."""
MAPPED = "its files, mapped"
"""Resident, and given back by the system where others need the memory."""
LOAD_SECONDS = 1.5
"""Least that transformers takes to load a model, however small: about 1 s on one core, and its first forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One stage."""

    work: Work = NOTHING
    """Of all workers."""
    busiest: Work = NOTHING
    """Of the worker that has most; what the stage waits for."""
    tensors: Mapping[str, float] = field(default_factory=dict)
    """Bytes alive at the worst moment, by what they are; on the device where there is one."""
    host: Mapping[str, float] = field(default_factory=dict)
    """Bytes in host memory beside those, per worker."""
    spilled_bytes: float = 0.0
    """Kept inputs that do not fit into memory, per worker."""
    network_bytes: float = 0.0
    """Between workers, all together."""
    fixed_seconds: float = 0.0
    """Time that no size changes."""
    steps: int = 0
    """Calls that one waits for: task runs of Prefect, each with a call on every worker."""


class Stages:
    """Loads of one compression.

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

    def all(self) -> dict[str, Load]:
        """Stage -> load, in the order in which they run."""
        asked = self.asked
        found = {"profile": self.profile(), "candidates": self.candidates()}
        if asked.cost_rows is not None and not asked.sequential:
            found["stitch"] = self.stitch()
        if asked.sequential:
            found["refine"] = self.refine(
                corrected=asked.corrected, polish_rounds=asked.polish_rounds, weighted=asked.weighs_tokens
            )
        if asked.held_out_windows:
            if asked.cost_rows is not None:
                found["uniform"] = self.stitch()
            found["guard"] = self.score(asked.held_out_windows, asked.length, variants=2, held_out=True)
        found["assemble"] = self.assemble()
        if asked.evaluated_windows:
            if asked.control:
                found["control"] = self.refine(corrected=False, polish_rounds=0, weighted=False)
            variants = 2 if asked.control else 1
            found["evaluate"] = self.score(asked.evaluated_windows, asked.evaluated_length, variants, held_out=False)
        return found

    # --- profile -----------------------------------------------------------------------------------------------------

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
        at_work = self._at_work(tokens)
        sums, computing = self.levels * self.set_bytes, backward + accumulating
        if asked.low_memory:  # one set while a micro-batch computes, two while they are merged
            sums = self.set_bytes if computing > self.set_bytes else min(self.levels, 2) * self.set_bytes
            computing = computing if computing > self.set_bytes else 0.0
        at_block = {
            "weights of two blocks": self._blocks_at_once(2) * self.block_bytes,
            "gradients between blocks": passes * state * min(explained, at_work),
            "one micro-batch": computing,
            "sums of Hessians": float(sums),
        }
        at_labels = {
            "weights of two blocks": self._blocks_at_once(2) * self.block_bytes,
            "head": float(shape.head_bytes),
            "logits": shape.labels.peak_bytes,
            "hidden states": (1 + passes * explained) * state * at_work,
        }
        embedding = {"embeddings": float(shape.embedding_bytes), "hidden states": 2 * state * at_work}
        waiting = {"gradients and hidden states": (1 + passes * explained) * state} if asked.low_memory else {}
        worst = max((at_block, at_labels, embedding), key=lambda found: sum(found.values()))
        merged = {"sums on their way to the store": 2.0 * self.set_bytes + self._writing(shape)}
        return Load(
            work=one * (asked.num_windows / self.windows) + self._labels(asked.tokens * explained) + merging + storing,
            busiest=one + labels + merging * (1 / self.num_workers) + storing * (1 / self.num_workers) + reading,
            tensors=worst,
            host={"kept block inputs": in_memory, **waiting, **merged},
            spilled_bytes=max(kept - in_memory, 0.0),
            network_bytes=float(self.active * sum(kind.sums_bytes * kind.count for kind in shape.kinds)),
            steps=2 * shape.num_blocks + 1,
        )

    def _at_work(self, tokens: float) -> float:
        """Share of the streams that is on the device: in low memory two micro-batches of them."""
        return min(1.0, 2 * self.micro_batch * self.asked.length / max(tokens, 1)) if self.asked.low_memory else 1.0

    def _blocks_at_once(self, number: int) -> float:
        """Blocks' weights on the device: in low memory the next one's wait."""
        return float(number - 1 if self.asked.low_memory else number)

    def _writing(self, shape: ModelShape) -> float:
        """Row groups while the widest matrix is written."""
        widest = max(spec.d_in for spec in shape.specs)
        across = ceil(widest / TILE)
        tiles = across * (across + 1) // 2
        return float(min(ROW_GROUPS_BYTES, 5 * tiles * TILE_BYTES))

    def _profile_block(self, kind: BlockKind) -> Work:
        asked, shape = self.asked, self.shape
        batches = self.windows / self.micro_batch
        tokens = self.windows * asked.length
        passes, explained = len(asked.relevance.passes), asked.explained_share
        traced = self._traced(kind.calibration.forward) + self._traced(kind.calibration.backward) * explained
        sums = []
        for members in kind.sites().values():
            seen = tokens * shape.share(members[0])
            sums.append(kernels.accumulate(members[0].d_in, seen, split=self._split))
            if asked.weighs_tokens:
                sums += [kernels.add_outputs(s.d_out, seen, split=self._split) for s in members if not s.routed]
            sums.append(work(wide=8.0 * passes * seen * explained * sum(spec.d_out for spec in members)))
        return traced * batches + total(sums)

    @property
    def _split(self) -> bool:
        """Whether sums over activations are products in bfloat16."""
        return not self.cpu and self.asked.dtype is torch.bfloat16

    def _rounded_sum(self, flops: float, width: int) -> Work:
        """Products of what the quantized stream lacks."""
        return kernels.activation_sum(flops, width=width, split=self._split, rounded=True)

    def _traced(self, traced: Traced) -> Work:
        return matmul(traced.flops, dtype=self.dtype, width=self.shape.hidden) + work(vector=traced.vector_bytes)

    def _labels(self, tokens: float) -> Work:
        shape = self.shape
        times = tokens / min(self.asked.label_tokens, self.asked.length)
        products = matmul(4.0 * tokens * shape.hidden * shape.vocabulary, dtype=self.dtype, width=shape.hidden)
        bytes_written = work(vector=shape.labels.vector_bytes * times)
        return products + bytes_written + kernels.sample_labels(tokens, shape.vocabulary, run=LABEL_RUN)

    # --- candidates --------------------------------------------------------------------------------------------------

    def candidates(self) -> Load:
        """Every layer, or some of its rows, at every choice."""
        return self._over_sites(self._rounded)

    def stitch(self) -> Load:
        """Every layer at one choice, from the stored Hessians."""
        return self._over_sites(
            lambda spec: _Rounded(rows=spec.d_out, choices=[self.refined_choice(spec)], costs=False, codes=True)
        )

    def _rounded(self, spec: LinearSpec) -> _Rounded:
        rows = self.asked.cost_rows
        choices = self._fitting(spec)
        if rows is None:
            return _Rounded(rows=spec.d_out, choices=choices, costs=True, codes=True)
        return _Rounded(rows=min(rows, spec.d_out), choices=choices, costs=True, codes=False)

    def _over_sites(self, rounded: Callable[[LinearSpec], _Rounded]) -> Load:
        """Some rounding of every layer, a site at a time on the next idle worker."""
        shape = self.shape
        everything, largest, num_sites, codes = NOTHING, NOTHING, 0, 0.0
        peak: dict[str, float] = {}
        cut = self._cut(rounded)
        for kind in shape.kinds:
            for site, members in kind.sites().items():
                for part in range(NUM_PARTS) if (kind.indices[0], site) in cut else [None]:
                    found = [replace(how, choices=part_of(how.choices, part)) for how in map(rounded, members)]
                    one = self._site(members, found)
                    everything += one * kind.count
                    num_sites += kind.count
                    if one.flops > largest.flops:
                        largest = one
                    memory = self._site_memory(members, found)
                    peak = max((peak, memory), key=lambda memory: sum(memory.values()))
                    codes = max(codes, _codes_of_site(members, found))
        rounds = ceil(num_sites / self.num_workers) / num_sites
        busiest = everything * max(rounds, 1 / self.num_workers)
        return Load(
            work=everything,
            busiest=busiest if busiest.flops > largest.flops else largest,
            tensors=peak,
            host={
                "codes of a site": codes,
                "row groups of a Hessian": self._writing(shape),
            },
            steps=shape.num_blocks,
        )

    def _cut(self, rounded: Callable[[LinearSpec], _Rounded]) -> frozenset[tuple[int, str]]:
        """(first block of a kind, input site) of the sites that are quantized in parts: where costs and codes of all
        rows are found."""
        kinds = self.shape.kinds
        specs = [replace(spec, block=index) for kind in kinds for index in kind.indices for spec in kind.specs]
        whole = all(how.costs and how.codes for how in map(rounded, specs))
        return cut_sites(specs, self.asked.choices) if whole else frozenset()

    def _fitting(self, spec: LinearSpec) -> list[Choice]:
        return [choice for choice in self.asked.choices if choice.fits(spec.d_in)]

    def _site(self, members: Sequence[LinearSpec], rounded: Sequence[_Rounded]) -> Work:
        d_in = members[0].d_in
        parts = [kernels.normalized(d_in), kernels.factorize(d_in), work(matrix_read=hessian_bytes(d_in))]
        for spec, how in zip(members, rounded, strict=True):
            num = len(how.choices)
            parts.append(kernels.quantize(how.rows, d_in, how.choices, kind=self.asked.grid, cpu=self.cpu))
            if how.costs:
                parts.append(kernels.predicted_cost(how.rows, d_in, num, cpu=self.cpu))
            parts.append(work(disk_read=spec.num_weights * self.shape.itemsize))
            if how.codes:
                parts.append(work(pack=spec.num_weights * num))
        return total(parts) + work(store_write=_codes_of_site(members, rounded))

    def _site_memory(self, members: Sequence[LinearSpec], rounded: Sequence[_Rounded]) -> dict[str, float]:
        d_in = members[0].d_in
        widest = max(rounded, key=lambda how: how.rows)
        num = len(widest.choices)
        square = 4.0 * d_in * d_in
        sweep = self._sweep_bytes(d_in, num * min(gptq.rows_at_once(d_in, num, cpu=self.cpu), widest.rows))
        weights = widest.rows * d_in
        # the column loop: W, its transpose, codes of all choices, one sweep; or the factorisation: four squares
        looping = 3 * square + (4 + 4 + 4 + num) * weights + sweep
        factoring = 4 * square
        return {
            "Hessian and factor": 3 * square if looping > factoring else factoring,
            "weights, codes and the column loop": looping - 3 * square if looping > factoring else 0.0,
            **({} if not self.cpu else {"candidates of the site": _codes_of_site(members, rounded)}),
        }

    def _sweep_bytes(self, d_in: int, stacked: int) -> float:
        """Of the column loop: errors and codes of some rows; on a GPU also errors by halves, and of the factor the part
        that a product takes."""
        if self.cpu:
            return 9.0 * d_in * stacked
        return 11.0 * d_in * stacked + 6.0 * (d_in if d_in <= halves.SPLIT_WHOLE else d_in / 2) ** 2

    # --- refine ------------------------------------------------------------------------------------------------------

    def refine(self, *, corrected: bool, polish_rounds: int, weighted: bool) -> Load:
        """Both streams through the blocks, a step's products, then its layers shared out over the workers."""
        shape, asked = self.shape, self.asked
        everything, busiest = NOTHING, NOTHING
        module = partial(self._module, corrected=corrected, polish_rounds=polish_rounds, weighted=weighted)
        tokens_share = asked.num_windows / self.windows
        peak: dict[str, float] = {}
        steps = 0
        for kind in shape.kinds:
            streaming, quantizing, waited = NOTHING, NOTHING, NOTHING
            for position, step in enumerate(kind.steps):
                streaming += self._step_forward(kind, position, corrected=corrected)
                of_worker: list[Work] = [NOTHING] * self.num_workers
                turn = 0
                for spec in step:
                    cuts = row_parts(spec.d_out, spec.d_in)
                    whole = self.num_workers == 1 or spec.routed or len(cuts) == 1
                    for part in [spec] if whole else [replace(spec, d_out=cut.stop - cut.start) for cut in cuts]:
                        of_worker[turn % self.num_workers] += module(part)
                        turn += 1
                    quantizing += module(spec)
                waited += max(of_worker, key=lambda found: found.flops)
                found = self._refine_memory(kind, step, corrected=corrected, polish_rounds=polish_rounds)
                peak = max((peak, found), key=lambda memory: sum(memory.values()))
            streaming += self._step_forward(kind, len(kind.steps), corrected=corrected)
            everything += (streaming * tokens_share + quantizing) * kind.count
            busiest += (streaming + waited + work(disk_read=kind.disk_bytes)) * kind.count
            steps += kind.count
        readers = [members[0] for kind in shape.blocks() for members in kind.sites().values()]
        sums = [self._sums_bytes(spec, corrected=corrected) for spec in readers]
        weights = {"token weights": 4.0 * asked.tokens * max(len(k.sites()) for k in shape.kinds)} if weighted else {}
        if asked.low_memory:
            weights["streams, and what is known inside a block"] = max(
                self._streams_bytes(kind, step, corrected=corrected) for kind in shape.kinds for step in kind.steps
            )
        return Load(
            work=everything,
            busiest=busiest,
            tensors=peak,
            host={"sums on their way": 2.0 * max(sums), **weights},
            network_bytes=sum(sums) * max(self.active - 1, 0),
            steps=steps,
        )

    def _linear_flops(self, specs: Sequence[LinearSpec], tokens: float) -> float:
        return sum(2.0 * spec.num_weights * tokens * self.shape.share(spec) for spec in specs)

    def _step_forward(self, kind: BlockKind, position: int, *, corrected: bool) -> Work:
        """Forward of one step's sums (or, behind the last, of moving the streams on), as the sweep stops and continues.

        Of a unit whose last layer's input was found in the step before, that layer runs alone, and of others that are
        known none; a forward stops where the step's input is found.
        """
        asked, stream = self.asked, self.shape.stream
        tokens = self.windows * asked.length
        family = stream.family
        local = {spec.name: stream.local_name(spec) for spec in kind.specs}
        order = list(kind.specs)
        readers = [local[step[0].name] for step in kind.steps[:position]]
        known = {unit.path for unit in family.units if unit.last in readers}
        done = {unit.path for unit in family.units if unit.last in readers[:-1]}
        last = position == len(kind.steps)
        routed = not last and kind.steps[position][0].routed
        stop = len(order) if last or routed else order.index(kind.steps[position][0])
        ran = []
        attention = kind.calibration.forward.flops - self._linear_flops(order, self.micro_batch * asked.length)
        attention = max(attention, 0.0) * self.windows / self.micro_batch
        ran_attention = False
        for spec in order[:stop]:
            unit = next((u for u in family.units if local[spec.name].startswith(u.path + ".")), None)
            if unit is not None and unit.path in known and (local[spec.name] != unit.last or unit.path in done):
                continue
            ran.append(spec)
        attention_unit = family.units[0]
        reached = any(local[spec.name] == attention_unit.last for spec in order[: stop + 1])
        if reached and attention_unit.path not in known:
            ran_attention = True
        flops = self._linear_flops(ran, tokens) + (attention if ran_attention else 0.0)
        share = flops / max(self._linear_flops(order, tokens) + attention, 1.0)
        vector = kind.calibration.forward.vector_bytes * self.windows / self.micro_batch * share
        streams = 2 if corrected else 1
        one = matmul(flops, dtype=self.dtype, width=self.shape.hidden) + work(vector=vector)
        quantized = order[: order.index(kind.steps[position][0])] if not last else order
        dense = total(kernels.dequantize(s.d_out, s.d_in, itemsize=self.shape.itemsize) for s in quantized)
        found = one * streams + dense
        if last:
            return found
        for members in _by_site(kind.steps[position]).values():
            d_in, seen = members[0].d_in, tokens * self.shape.share(members[0])
            found += kernels.accumulate(d_in, seen, split=self._split)
            if corrected and self._adds(members[0]):  # W (x - xq), P
                found += self._rounded_sum(4.0 * seen * members[0].num_weights, d_in)
                found += work(wide=20.0 * seen * (d_in + members[0].d_out))
            elif corrected:
                found += self._rounded_sum(2.0 * seen * d_in * d_in, d_in)
                found += work(wide=20.0 * seen * d_in)
        return found

    def _adds(self, spec: LinearSpec) -> bool:
        stream = self.shape.stream
        return any(unit.added and unit.last == stream.local_name(spec) for unit in stream.family.units)

    def _sums_bytes(self, spec: LinearSpec, *, corrected: bool) -> float:
        """C, and D or P, of a site that the layer reads."""
        second = spec.num_weights if self._adds(spec) else spec.d_in**2
        return 4.0 * (spec.d_in**2 + (second if corrected else 0))

    def _module(self, spec: LinearSpec, *, corrected: bool, polish_rounds: int, weighted: bool) -> Work:
        choice = self.refined_choice(spec)
        row_blocks = self.asked.row_blocks if weighted and not spec.routed else 1
        found = kernels.quantize_refined(
            spec.d_out,
            spec.d_in,
            choice,
            corrected=corrected,
            pulled=self._adds(spec),
            polish_rounds=polish_rounds,
            polish_sweeps=POLISH_SWEEPS,
            row_blocks=row_blocks,
            kind=self.asked.grid,
            cpu=self.cpu,
        )
        moved = self._sums_bytes(spec, corrected=corrected)
        reading = work(disk_read=spec.num_weights * self.shape.itemsize, wide=2 * moved, pack=2 * spec.num_weights)
        if row_blocks > 1:
            reading += work(matrix_read=sum(map(hessian_bytes, kernels.output_chunks(spec.d_out))))
        return found + reading + work(store_write=codes_bytes(spec, choice))

    def refined_choice(self, spec: LinearSpec) -> Choice:
        """A choice near the budget: what the allocation takes on the average."""
        fitting = self._fitting(spec)
        return min(fitting, key=lambda c: abs(c.bits + 16 / (spec.d_in / c.groups(spec.d_in)) - self.asked.budget_bits))

    def _refine_memory(
        self, kind: BlockKind, step: Sequence[LinearSpec], *, corrected: bool, polish_rounds: int
    ) -> dict[str, float]:
        shape, asked = self.shape, self.asked
        sites = _by_site(step)
        squares = sum(self._sums_bytes(members[0], corrected=corrected) for members in sites.values())
        widest = max(step, key=lambda spec: spec.d_in * max(spec.d_in, spec.d_out))
        square, weights = 4.0 * widest.d_in**2, 4.0 * widest.num_weights
        batch = self.micro_batch * asked.length
        stacked = corrected and (self.cpu or widest.num_weights < quantize.ALONE_ELEMENTS)
        part = max(rows.stop - rows.start for rows in row_parts(widest.d_out, widest.d_in))
        rows = (2 if stacked else 1) * part
        sweep = self._sweep_bytes(widest.d_in, min(gptq.rows_at_once(widest.d_in, 1, cpu=self.cpu), rows))
        # beside the sums C, normalized, and: its permuted copy and factor; two factors, on a CPU a copy of one, and the
        # solution; a factor and the column loop; or a factor, another C for the polish, and some weights
        factoring = 3 * square + weights
        solving = (4 if self.cpu else 3) * square + 4 * weights if corrected else 0.0
        looping = 2 * square + weights * ((8 if stacked else 5) if corrected else 3) + sweep
        at_once = widest.d_in if widest.d_in <= halves.SPLIT_WHOLE else descent._GPU_BLOCK_COLUMNS
        halved = 0.0 if self.cpu else 6.0 * widest.d_in * at_once  # of C
        polishing = 3 * square + 4 * weights + halved if polish_rounds else 0.0
        rounding = max(factoring, solving, looping, polishing)
        sets = min(self.levels, 2) if asked.low_memory else self.levels
        summing = sets * squares + batch * widest.d_in * 4.0 * (5 if corrected else 3)
        tokens = self.windows * asked.length
        at_work = self._at_work(tokens)
        state = tokens * shape.hidden * shape.itemsize * (2 if corrected else 1)
        known = self._streams_bytes(kind, step, corrected=corrected) - state
        return {
            "weights of two blocks, and the block quantized": self._blocks_at_once(3) * self.block_bytes,
            "hidden states": state * at_work,
            "what is known inside the block": known * at_work,
            **(
                {"rounding one layer": rounding + squares}
                if rounding + squares > summing
                else {"sums C and D": summing}
            ),
        }

    def _streams_bytes(self, kind: BlockKind, step: Sequence[LinearSpec], *, corrected: bool) -> float:
        """Hidden states, and what is known inside the block."""
        streams = 2 if corrected else 1
        width = self.shape.hidden * streams + self._known_width(kind, step, streams)
        return float(self.windows * self.asked.length * self.shape.itemsize * width)

    def _known_width(self, kind: BlockKind, step: Sequence[LinearSpec], streams: int) -> int:
        """Numbers a token of all streams that are known inside the block when a step's sums are taken.

        Outputs of units; of the quantized stream this step's inputs, if they are a unit's last layer's. At the block's
        last site the original stream has moved on.
        """
        local = self.shape.stream.local_name
        lasts = {unit.last for unit in self.shape.stream.family.units}
        last = step[0].input_site == kind.specs[-1].input_site
        others = streams - 1
        width = 0
        for spec in kind.specs[: kind.specs.index(step[0])]:
            if local(spec) in lasts:
                width += spec.d_out * (1 if last else streams)
        if local(step[0]) in lasts:
            width += step[0].d_in + (0 if last else others * step[0].d_out)
        return width

    # --- scores, assembly --------------------------------------------------------------------------------------------

    def score(self, windows: int, length: int, variants: int, *, held_out: bool) -> Load:
        """The original and the variants on windows, one at a time; every worker streams all blocks."""
        shape = self.shape
        mine = max(len(r) for r in assign(windows, self.num_workers))
        models = 1 + variants
        forward = total(
            self._traced((kind.held_out if held_out else kind.measured).forward) * kind.count for kind in shape.kinds
        )
        logits = matmul(2.0 * length * shape.hidden * shape.vocabulary, dtype=self.dtype, width=shape.hidden)
        one = (forward + logits + work(vector=26.0 * length * shape.vocabulary)) * models
        weights = total(
            kernels.dequantize(s.d_out, s.d_in, itemsize=shape.itemsize) * k.count for k in shape.kinds for s in k.specs
        )
        codes = shape.num_weights * self.asked.budget_bits / 8
        loading = weights * variants + work(
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
        once += matmul(probe, dtype=self.dtype, width=PROBE_TOKENS)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rounded:
    """How much of a layer is quantized, and what of it is kept."""

    rows: int
    choices: Sequence[Choice]
    costs: bool
    """Whether its error is found too."""
    codes: bool
    """Whether its codes are stored."""


def _codes_of_site(members: Sequence[LinearSpec], rounded: Sequence[_Rounded]) -> float:
    """Bytes."""
    return sum(
        codes_bytes(spec, choice)
        for spec, how in zip(members, rounded, strict=True)
        if how.codes
        for choice in how.choices
    )


def _by_site(step: Sequence[LinearSpec]) -> dict[str, list[LinearSpec]]:
    found: dict[str, list[LinearSpec]] = {}
    for spec in step:
        found.setdefault(spec.input_site, []).append(spec)
    return found
