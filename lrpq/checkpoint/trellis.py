"""The trellis format: lrpq's own, for codes that are symbols of a trellis and for steps of a grid beside them.

A module ``m`` has, instead of ``m.weight``, the packed form of its codes (quant/packing.py): ``m.weight_packed``,
``m.weight_scale``, ``m.weight_shape``. ``quantization_config`` says which modules have which choice, as that of
compressed-tensors does, and what a reader has to share with the writer: rows of a segment, bits of a state, and the
sha256 of every codebook that is used, so that values of another table are an error and not another model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lrpq.checkpoint import compressed_tensors
from lrpq.checkpoint.compressed_tensors import check_choice, packed_parts
from lrpq.checkpoint.layout import StoredTensor
from lrpq.checkpoint.modules import WEIGHT
from lrpq.errors import ConfigError
from lrpq.model.layers import Choice, LinearSpec
from lrpq.quant.trellis import LEAST_ROWS, SEGMENT_ROWS, STATE_BITS, WIDTHS, codebook

METHOD, FORMAT, VERSION = "lrpq", "trellis", 1
packed_tensors, loaded = compressed_tensors.packed_tensors, compressed_tensors.loaded


def stored_tensors(original: StoredTensor, choice: Choice) -> tuple[StoredTensor, ...]:
    """Names, dtypes and shapes of the tensors that hold a quantized module.

    Raises:
        ConfigError: the format cannot store the choice.
    """
    module = original.name.removesuffix(WEIGHT)
    d_out, d_in = original.shape
    check_choice(module, choice, d_in)
    rest = d_out % SEGMENT_ROWS
    if choice.trellis and (choice.bits not in WIDTHS or 0 < rest < LEAST_ROWS):
        raise ConfigError(f"module {module}: {choice} is no trellis of {d_out} rows; leave its codes uniform")
    return packed_parts(original, choice)


def quantization_config(
    choices: Mapping[str, Choice], *, specs: Sequence[LinearSpec] = (), ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """Describe the quantized modules for ``config.json``; see ``compressed_tensors.quantization_config``."""
    widths = sorted({choice.bits for choice in choices.values() if choice.trellis})
    groups = compressed_tensors.described_groups(choices, specs=specs, ignore=ignore, format=FORMAT)
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "version": VERSION,
        "segment_rows": SEGMENT_ROWS,
        "state_bits": STATE_BITS,
        "codebooks": {str(bits): codebook_digest(bits) for bits in widths},
        **groups,
    }


def check_reader(config: Mapping[str, Any]) -> None:
    """Refuse a ``quantization_config`` whose codes this version would read wrongly.

    Raises:
        ValueError, LookupError, TypeError or AttributeError: with what differs.
    """
    for name, own in (("format", FORMAT), ("version", VERSION)):
        if config[name] != own:
            raise ValueError(f"{name} {config[name]!r}; this version of lrpq reads {own!r}")
    for name, number in (("segment_rows", SEGMENT_ROWS), ("state_bits", STATE_BITS)):
        if config[name] != number:
            raise ValueError(f"{name} {config[name]!r}, expected {number}")
    for bits, digest in config["codebooks"].items():
        if int(bits) not in WIDTHS or digest != codebook_digest(int(bits)):
            raise ValueError(f"a codebook of {bits} bits that this version of lrpq does not have")


def codebook_digest(bits: int) -> str:
    """sha256 of a codebook's values as float16, little-endian, in the order of their states.

    Of the values, not of lrpq's file of all codebooks: a checkpoint depends on the widths that it uses, whatever is
    added to others, and another reader may keep the values in a form of its own.
    """
    return hashlib.sha256(codebook(bits).half().numpy().astype("<f2").tobytes()).hexdigest()
