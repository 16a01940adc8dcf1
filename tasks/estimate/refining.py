"""The refinement's load; the control's is one without corrections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from lrpq.model.layers import Choice, LinearSpec
from lrpq.plan import kernels
from lrpq.plan.trellis import trellis_steps
from lrpq.plan.work import NOTHING, Work, matmul, total, work
from lrpq.quant import descent, gptq, halves
from lrpq.refine import quantize
from lrpq.refine.row_parts import row_parts
from tasks.estimate.common import Common
from tasks.estimate.load import Load
from tasks.estimate.model import BlockKind
from tasks.estimate.objects import codes_bytes, hessian_bytes

POLISH_SWEEPS = 2
"""Default of ``polish``."""
Choose = Callable[[LinearSpec], Choice]
"""What a layer is quantized at."""


class Refining(Common):
    """Of the refinement."""

    def refine(self, *, corrected: bool, polish_rounds: int, weighted: bool, trellis: bool) -> Load:
        """Both streams through the blocks, a step's products, then its layers shared out over the workers; codes are of
        the plan's kind or uniform."""
        shape, asked = self.shape, self.asked
        everything, busiest = NOTHING, NOTHING
        choose = self.planned_choice if trellis else self.refined_choice
        module = partial(
            self._module, choose=choose, corrected=corrected, polish_rounds=polish_rounds, weighted=weighted
        )
        tokens_share = asked.num_windows / self.windows
        peak: dict[str, float] = {}
        steps = 0
        for kind in shape.kinds:
            streaming, quantizing, waited = NOTHING, NOTHING, NOTHING
            for position, step in enumerate(kind.steps):
                streaming += self._step_forward(kind, position, choose=choose, corrected=corrected)
                of_worker: list[Work] = [NOTHING] * self.num_workers
                turn = 0
                for spec in step:
                    cuts = row_parts(spec.d_out, spec.d_in)
                    whole = self.num_workers == 1 or spec.routed or len(cuts) == 1
                    sizes = [cut.stop - cut.start for cut in cuts]
                    for parts in [sizes] if whole else [[rows] for rows in sizes]:
                        of_worker[turn % self.num_workers] += module(spec, parts)
                        turn += 1
                    quantizing += module(spec, sizes)
                # of trellis codes most of the time goes into steps, which are no FLOPs
                waited += max(of_worker, key=lambda found: (trellis_steps(found), found.flops))
                found = self._refine_memory(kind, step, choose=choose, corrected=corrected, polish_rounds=polish_rounds)
                peak = max((peak, found), key=lambda memory: sum(memory.values()))
            streaming += self._step_forward(kind, len(kind.steps), choose=choose, corrected=corrected)
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

    def _step_forward(self, kind: BlockKind, position: int, *, choose: Choose, corrected: bool) -> Work:
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
        dense = total(
            kernels.dequantize(s.d_out, s.d_in, itemsize=self.shape.itemsize, choice=choose(s)) for s in quantized
        )
        found = one * streams + dense
        if last:
            return found
        for members in _by_site(kind.steps[position]).values():
            d_in, seen = members[0].d_in, tokens * self.shape.share(members[0])
            found += kernels.accumulate(d_in, seen, split=self.split)
            if corrected and self._adds(members[0]):  # W (x - xq), P
                found += self.rounded_sum(4.0 * seen * members[0].num_weights, d_in)
                found += work(wide=20.0 * seen * (d_in + members[0].d_out))
            elif corrected:
                found += self.rounded_sum(2.0 * seen * d_in * d_in, d_in)
                found += work(wide=20.0 * seen * d_in)
        return found

    def _adds(self, spec: LinearSpec) -> bool:
        stream = self.shape.stream
        return any(unit.added and unit.last == stream.local_name(spec) for unit in stream.family.units)

    def _sums_bytes(self, spec: LinearSpec, *, corrected: bool) -> float:
        """C, and D or P, of a site that the layer reads."""
        second = spec.num_weights if self._adds(spec) else spec.d_in**2
        return 4.0 * (spec.d_in**2 + (second if corrected else 0))

    def _module(
        self,
        spec: LinearSpec,
        parts: Sequence[int],
        *,
        choose: Choose,
        corrected: bool,
        polish_rounds: int,
        weighted: bool,
    ) -> Work:
        """Some parts of a layer's rows, of so many rows each."""
        choice = choose(spec)
        spec = replace(spec, d_out=sum(parts))
        row_blocks = self.asked.row_blocks if weighted and not spec.routed else 1
        how = kernels.Refinement(
            corrected=corrected,
            polish_rounds=polish_rounds,
            polish_sweeps=POLISH_SWEEPS,
            row_blocks=row_blocks,
            kind=self.asked.grid,
            cpu=self.cpu,
            threads=self.asked.threads,
        )
        apart = parts if choice.trellis else None  # of uniform codes a part is a few steps of the column loop
        found = kernels.quantize_refined(spec.d_out, spec.d_in, choice, how, pulled=self._adds(spec), parts=apart)
        moved = self._sums_bytes(spec, corrected=corrected)
        reading = work(disk_read=spec.num_weights * self.shape.itemsize, wide=2 * moved, pack=2 * spec.num_weights)
        if row_blocks > 1:
            reading += work(matrix_read=sum(map(hessian_bytes, kernels.output_chunks(spec.d_out))))
        return found + reading + work(store_write=codes_bytes(spec, choice))

    def _refine_memory(
        self, kind: BlockKind, step: Sequence[LinearSpec], *, choose: Choose, corrected: bool, polish_rounds: int
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
        choice = choose(widest)
        sweep = self.sweep_bytes(widest.d_in, min(gptq.rows_at_once(widest.d_in, 1, cpu=self.cpu), rows))
        if choice.trellis:  # or uniform codes, which stand in for streams
            sweep = max(sweep, self.streams_bytes(widest.d_in, rows))
        # beside the sums C, normalized, and: its permuted copy and factor; two factors, on a CPU a copy of one, and the
        # solution; a factor and the column loop; or a factor, another C for the polish, and some weights
        factoring = 3 * square + weights
        solving = (4 if self.cpu else 3) * square + 4 * weights if corrected else 0.0
        looping = 2 * square + weights * ((8 if stacked else 5) if corrected else 3) + sweep
        at_once = widest.d_in if widest.d_in <= halves.SPLIT_WHOLE else descent.GPU_BLOCK_COLUMNS
        halved = 0.0 if self.cpu else 6.0 * widest.d_in * at_once  # of C
        polishing = 3 * square + 4 * weights + halved if polish_rounds else 0.0
        if choice.trellis and polish_rounds:  # H by its diagonal and put in order; then weights, targets, errors
            polishing = max(5 * square + 7 * weights, 4 * square + 9 * weights)
        blocks = 0.0
        # of a part's rows: targets in order, transposed, in another unit, moved, and errors; the factor twice
        if choice.trellis and asked.row_blocks > 1:
            blocks = 3 * square + 3 * weights + 20.0 * widest.d_in * part + self.streams_bytes(widest.d_in, part)
        rounding = max(factoring, solving, looping, blocks, polishing)
        sets = min(self.levels, 2) if asked.low_memory else self.levels
        summing = sets * squares + batch * widest.d_in * 4.0 * (5 if corrected else 3)
        tokens = self.windows * asked.length
        at_work = self.at_work(tokens)
        state = tokens * shape.hidden * shape.itemsize * (2 if corrected else 1)
        known = self._streams_bytes(kind, step, corrected=corrected) - state
        return {
            "weights of two blocks, and the block quantized": self.blocks_at_once(3) * self.block_bytes,
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


def _by_site(step: Sequence[LinearSpec]) -> dict[str, list[LinearSpec]]:
    found: dict[str, list[LinearSpec]] = {}
    for spec in step:
        found.setdefault(spec.input_site, []).append(spec)
    return found
