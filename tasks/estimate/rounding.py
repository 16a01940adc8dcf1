"""Loads of what rounds every layer behind the original inputs: candidates, and codes of one plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from lrpq.model.layers import Choice, LinearSpec
from lrpq.plan import kernels
from lrpq.plan.work import NOTHING, Work, total, work
from lrpq.quant import gptq
from tasks.estimate.common import Common
from tasks.estimate.load import Load
from tasks.estimate.objects import codes_bytes, hessian_bytes
from tasks.site_parts import NUM_PARTS, cut_sites, part_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """How much of a layer is quantized, and what of it is kept."""

    rows: int
    choices: Sequence[Choice]
    costs: bool
    """Whether its error is found too."""
    codes: bool
    """Whether its codes are stored."""


class Rounding(Common):
    """Of candidates and stitching."""

    def candidates(self) -> Load:
        """Every layer, or some of its rows, at every choice."""
        return self._over_sites(self._rounded)

    def stitch(self, *, trellis: bool) -> Load:
        """Every layer at one choice, from the stored Hessians; with the plan's kind of codes or uniform ones."""
        chosen = self.planned_choice if trellis else self.refined_choice
        return self._over_sites(lambda spec: Rounded(rows=spec.d_out, choices=[chosen(spec)], costs=False, codes=True))

    def _rounded(self, spec: LinearSpec) -> Rounded:
        rows = self.asked.cost_rows
        choices = self.fitting(spec)
        if rows is None:
            return Rounded(rows=spec.d_out, choices=choices, costs=True, codes=True)
        return Rounded(rows=min(rows, spec.d_out), choices=choices, costs=True, codes=False)

    def _over_sites(self, rounded: Callable[[LinearSpec], Rounded]) -> Load:
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
                "row groups of a Hessian": self.writing(shape),
            },
            steps=shape.num_blocks,
        )

    def _cut(self, rounded: Callable[[LinearSpec], Rounded]) -> frozenset[tuple[int, str]]:
        """(first block of a kind, input site) of the sites that are quantized in parts: where costs and codes of all
        rows are found."""
        kinds = self.shape.kinds
        specs = [replace(spec, block=index) for kind in kinds for index in kind.indices for spec in kind.specs]
        whole = all(how.costs and how.codes for how in map(rounded, specs))
        return cut_sites(specs, self.asked.choices) if whole else frozenset()

    def _site(self, members: Sequence[LinearSpec], rounded: Sequence[Rounded]) -> Work:
        d_in = members[0].d_in
        parts = [kernels.normalized(d_in), kernels.factorize(d_in), work(matrix_read=hessian_bytes(d_in))]
        for spec, how in zip(members, rounded, strict=True):
            num = len(how.choices)
            threads = self.asked.threads
            parts.append(
                kernels.quantize(how.rows, d_in, how.choices, kind=self.asked.grid, cpu=self.cpu, threads=threads)
            )
            if how.costs:
                parts.append(kernels.predicted_cost(how.rows, d_in, num, cpu=self.cpu))
            parts.append(work(disk_read=spec.num_weights * self.shape.itemsize))
            if how.codes:
                parts.append(work(pack=spec.num_weights * num))
        return total(parts) + work(store_write=_codes_of_site(members, rounded))

    def _site_memory(self, members: Sequence[LinearSpec], rounded: Sequence[Rounded]) -> dict[str, float]:
        d_in = members[0].d_in
        widest = max(rounded, key=lambda how: how.rows)
        num = len(widest.choices)
        square = 4.0 * d_in * d_in
        streams = [choice for choice in widest.choices if choice.trellis]
        uniform = num - len(streams)
        stacked = uniform * min(gptq.rows_at_once(d_in, max(1, uniform), cpu=self.cpu), widest.rows)
        sweeps = [self.streams_bytes(d_in, widest.rows)] if streams else []
        sweep = max([self.sweep_bytes(d_in, stacked), *sweeps])
        weights = widest.rows * d_in
        # the column loop: W, its transpose, codes of all choices, one sweep; or the factorisation: four squares
        looping = 3 * square + (4 + 4 + 4 + num) * weights + sweep
        factoring = 4 * square
        return {
            "Hessian and factor": 3 * square if looping > factoring else factoring,
            "weights, codes and the column loop": looping - 3 * square if looping > factoring else 0.0,
            **({} if not self.cpu else {"candidates of the site": _codes_of_site(members, rounded)}),
        }


def _codes_of_site(members: Sequence[LinearSpec], rounded: Sequence[Rounded]) -> float:
    """Bytes."""
    return sum(
        codes_bytes(spec, choice)
        for spec, how in zip(members, rounded, strict=True)
        if how.codes
        for choice in how.choices
    )
