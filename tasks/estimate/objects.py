"""What a run leaves in the store: bytes and objects of every stage, by the formats' own constants and key names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lrpq.model.layers import Choice, LinearSpec
from lrpq.notation import BITS_PER_BYTE
from lrpq.quant.packing import storage_bits
from tasks.estimate.asked import Asked
from tasks.estimate.model import BlockKind, ModelShape
from tasks.hessian_bands import wide_sites

COMPRESSED = 0.84
"""zstd on split bytes of float32 values that look random: measured where tasks/store/symmetric.py sets its writer."""
TABLE_BYTES = 4500
"""A small Parquet table with its schema and checksums."""
HEADER_BYTES = 330
"""Of a tensor in a safetensors object: its entry and its checksum."""
MANIFEST_BYTES = 2500
MANIFEST_BYTES_A_MODULE = 65
TOKEN_BYTES = 4.2
"""Of a token id in a window's table: int64, compressed."""
WINDOW_SCORE_BYTES = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What one stage stores."""

    num_bytes: float
    num_objects: int

    def __add__(self, other: Stored) -> Stored:
        return Stored(num_bytes=self.num_bytes + other.num_bytes, num_objects=self.num_objects + other.num_objects)


EMPTY = Stored(num_bytes=0.0, num_objects=0)


def hessian_bytes(width: int) -> float:
    """One matrix as the store writes it: the upper triangle; padding and lower halves compress to nothing."""
    return COMPRESSED * 4 * width * (width + 1) / 2


def codes_bytes(spec: LinearSpec, choice: Choice) -> float:
    """One module's packed codes, scales and shape, with the headers of three tensors."""
    return storage_bits(spec.d_out, spec.d_in, choice) / BITS_PER_BYTE + 16 + 3 * HEADER_BYTES


def stored(shape: ModelShape, asked: Asked) -> dict[str, Stored]:
    """Stage -> what it leaves in the store."""
    windows = (asked.num_windows + asked.held_out_windows) * asked.length
    windows += asked.evaluated_windows * asked.evaluated_length
    tables = (2 if asked.held_out_windows else 1) + (1 if asked.evaluated_windows else 0)
    texts = 2 if asked.evaluated_windows else 1
    found = {
        "calibrate": Stored(
            num_bytes=windows * TOKEN_BYTES + tables * TABLE_BYTES + texts * MANIFEST_BYTES, num_objects=tables + texts
        ),
        "profile": _manifest(shape) + _summed(_profile(kind, shape, asked) for kind in shape.blocks()),
        "candidates": _manifest() + _summed(_candidates(kind, asked) for kind in shape.blocks()),
        "allocate": _manifest(shape),
    }
    if asked.head_choice is not None and shape.stream.head_spec is not None:
        head = shape.stream.head_spec
        found["profile"] += Stored(num_bytes=hessian_bytes(head.d_in) + 8 * head.d_out + TABLE_BYTES, num_objects=2)
        found["candidates"] += Stored(num_bytes=codes_bytes(head, asked.head_choice) + TABLE_BYTES, num_objects=2)
    refined = Stored(
        num_bytes=shape.num_weights * asked.budget_bits / BITS_PER_BYTE + len(shape.specs) * (16 + 4 * HEADER_BYTES),
        num_objects=len(shape.specs),
    )
    if asked.forecast_windows:
        found["forecast"] = _manifest(shape)
    if asked.sequential:
        found["refine"] = _manifest(shape) + refined
    elif asked.cost_rows is not None:
        found["stitch"] = _manifest(shape) + refined
    if asked.held_out_windows:
        if asked.cost_rows is not None:
            found["uniform"] = _manifest(shape) + refined
        found["guard"] = _manifest(shape, times=2)
    if asked.evaluated_windows:
        if asked.control:
            found["control"] = _manifest(shape) + refined
        scores = Stored(num_bytes=3 * asked.evaluated_windows * WINDOW_SCORE_BYTES, num_objects=0)
        found["evaluate"] = _manifest() + scores
    return found


def _manifest(shape: ModelShape | None = None, *, times: int = 1) -> Stored:
    """A stage's manifest; with a shape, one that names every module."""
    modules = 0 if shape is None else times * MANIFEST_BYTES_A_MODULE * len(shape.specs)
    return Stored(num_bytes=MANIFEST_BYTES + modules, num_objects=1)


def _summed(parts: Iterable[Stored]) -> Stored:
    found = EMPTY
    for part in parts:
        found += part
    return found


def _profile(kind: BlockKind, shape: ModelShape, asked: Asked) -> Stored:
    """Sums, curvature, token weights and scores of a block; tokens of an expert are stored with their indices."""
    sites = kind.sites()
    weighed = sites if asked.weighs_tokens else {}
    tokens = sum((8 if m[0].routed else 4) * shape.share(m[0]) * asked.tokens for m in weighed.values())
    names = len(weighed) + sum(members[0].routed for members in weighed.values()) + 2 * len(kind.specs)
    hessians = sum(hessian_bytes(members[0].d_in) for members in sites.values())
    hessians += sum(hessian_bytes(rows) for rows in kind.chunks)
    pooled = next((hessian_bytes(s.d_in) for s in kind.specs if s.routed), 0.0)  # over all experts
    curvature = sum(8 * (spec.d_out + 1) for spec in kind.specs)
    num_bytes = hessians + pooled + curvature + tokens + names * HEADER_BYTES + 2 * TABLE_BYTES
    if not asked.weighs_tokens:
        return Stored(num_bytes=num_bytes, num_objects=3)
    return Stored(num_bytes=num_bytes, num_objects=6 if wide_sites(kind.specs) else 5)


def _candidates(kind: BlockKind, asked: Asked) -> Stored:
    """A table of costs a site; beside it the codes of all choices, an object a site, where they are kept."""
    sites = len(kind.sites())
    if asked.cost_rows is not None:
        return Stored(num_bytes=sites * 1.5 * TABLE_BYTES, num_objects=sites)
    codes = sum(codes_bytes(spec, c) for spec in kind.specs for c in asked.choices if c.fits(spec.d_in))
    return Stored(num_bytes=codes + sites * 1.5 * TABLE_BYTES, num_objects=2 * sites)
