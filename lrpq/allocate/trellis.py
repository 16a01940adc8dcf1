"""The same choices with trellis codes, whatever candidates have.

Candidates are rounded on uniform grids: a pass of GPTQ with trellis codes takes hundreds of times as long, and what it
would find is known. On a layer a trellis leaves about the same share of the uniform grid's loss at all widths, in whole
rows a smaller one the wider, and about the same on all layers of a model (`lrpq.quant.trellis.SHARES`), so that the
costs of uniform candidates rank layers and widths for trellis codes too. What the share depends on is the number of
columns under a scale: a uniform grid has to reach a group's largest weight, a trellis does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from lrpq.allocate.options import CostRow
from lrpq.errors import ConfigError
from lrpq.model.layers import HEAD, Choice, LinearSpec
from lrpq.quant.packing import storage_bits
from lrpq.quant.trellis import LEAST_ROWS, SEGMENT_ROWS, SHARES, share_of_grid

LARGEST_SHARE_WITHOUT = 0.5
"""Of the weights, in layers that keep uniform codes where trellis codes are asked for."""


def takes_trellis(spec: LinearSpec) -> bool:
    """Whether a layer's rows make segments, in each of its tensors; the head has the codes of its candidates."""
    rows, parts = spec.d_out // len(spec.stored), len(spec.stored)
    if spec.input_site == HEAD or (parts > 1 and rows % SEGMENT_ROWS):
        return False
    rest = rows % SEGMENT_ROWS
    return rest == 0 or rest >= LEAST_ROWS


def check_streams(specs: Iterable[LinearSpec]) -> None:
    """Refuse trellis codes for a model most of whose weights could not have them.

    Raises:
        ConfigError: the first such layer is named.
    """
    specs = [spec for spec in specs if spec.input_site != HEAD]
    uniform = _without(specs)
    without = [spec for spec in specs if _shares(spec) in uniform]
    share = sum(spec.num_weights for spec in without) / max(1, sum(spec.num_weights for spec in specs))
    if share > LARGEST_SHARE_WITHOUT:
        first = next(spec for spec in without if not takes_trellis(spec))
        rows = " + ".join([str(first.d_out // len(first.stored))] * len(first.stored))
        raise ConfigError(
            f"--codes trellis: {len(without)} of {len(specs)} layers, with {share:.0%} of the weights, have no rows "
            f"for streams of {SEGMENT_ROWS}, such as {first.name} with {rows}; leave it out"
        )


def without_streams(choices: Mapping[str, Choice | None], specs: Iterable[LinearSpec]) -> int:
    """Modules, the head apart, with uniform codes of a width that a trellis has."""
    found = [choices[spec.name] for spec in specs if spec.input_site != HEAD]
    return sum(c is not None and not c.trellis and with_trellis(c).trellis for c in found)


def with_trellis(choice: Choice) -> Choice:
    """The choice with trellis codes, where there are codes of its width and group size; else itself."""
    return replace(choice, trellis=choice.bits in SHARES.get(choice.group_size, {}))


def with_trellis_codes(rows: Iterable[CostRow]) -> list[CostRow]:
    """Rows of uniform candidates with trellis codes, wherever a layer and a width can have them. Experts that share a
    choice have them all or none."""
    rows = list(rows)
    uniform = _without(row.module for row in rows)
    return [row if _shares(row.module) in uniform else _row(row) for row in rows]


def _without(specs: Iterable[LinearSpec]) -> set[str]:
    """What shares a choice and cannot have streams."""
    return {_shares(spec) for spec in specs if not takes_trellis(spec)}


def _shares(spec: LinearSpec) -> str:
    """What a layer shares its choice with."""
    return spec.fused_group if spec.routed else spec.name


def _row(row: CostRow) -> CostRow:
    if row.choice is None:
        return row
    choice = with_trellis(row.choice)
    if not choice.trellis:
        return row
    bits = storage_bits(row.module.d_out, row.module.d_in, choice)
    return replace(row, choice=choice, storage_bits=bits, cost_nats=row.cost_nats * share_of_grid(choice))
