"""Parts of a model outside its blocks that can be quantized too: what loads them, and the one choice they get.

A table of facts, held to the installed transformers by tests/integration/test_quantize_head.py: where a newer one loads
more, that test fails and the table is to be updated.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence

from lrpq.allocate.targets import Target
from lrpq.errors import ConfigError
from lrpq.model.layers import Choice


class Part(enum.Enum):
    """A weight outside the blocks."""

    HEAD = "head"
    """With a weight of its own."""
    TIED_HEAD = "tied head"
    """Its weight is the token embedding's."""
    EMBEDDINGS = "embeddings"


OPTIONS: Mapping[Part, str] = {
    Part.HEAD: "--quantize-head",
    Part.TIED_HEAD: "--quantize-head",
    Part.EMBEDDINGS: "--quantize-embeddings",
}
NOT_LOADED: Mapping[Target, Mapping[Part, str]] = {
    Target.TRANSFORMERS: {
        Part.TIED_HEAD: "the head shares its weight with the embedding, and transformers 5.23 fails to load it packed",
        Part.EMBEDDINGS: "transformers 5.23 fails to load packed embeddings (it initialises a weight they do not have)",
    },
    Target.VLLM: {
        # Its pull request 37291 (March 2026) routes packed heads to the linear kernels; older versions read none.
        Part.HEAD: "vLLM read no packed head for long, and lrpq has not been tested with versions that do",
        Part.TIED_HEAD: "the head shares its weight with the embedding, which vLLM keeps at 16 bits",
        Part.EMBEDDINGS: "vLLM keeps embeddings at 16 bits",
    },
}
"""Target -> what it does not load packed, and why. What is not named, it loads."""
NOT_WRITTEN: Mapping[str, Mapping[Part, str]] = {
    "gptq": {Part.HEAD: "lrpq writes no packed head in this format"},
}
"""Format of the checkpoint (lrpq.checkpoint.formats) -> what it is not written with, and why."""


def check_parts(target: Target, *, format: str, head: bool, embeddings: bool, tied: bool) -> None:
    """Refuse to quantize what the target does not load, or the format does not hold.

    Args:
        target: the runtime that must load the checkpoint.
        format: what it is written in, ``compressed-tensors``, ``dense``, ``gptq`` or ``trellis``.
        head: the head is to be quantized.
        embeddings: the embeddings are.
        tied: the model's head has the embedding's weight.

    Raises:
        ConfigError: the option, the reason, and what to do instead.
    """
    asked = [Part.EMBEDDINGS] if embeddings else []
    asked += [Part.TIED_HEAD if tied else Part.HEAD] if head else []
    for part in asked:
        reason = NOT_LOADED[target].get(part)
        if reason is not None:
            elsewhere = [other.value for other in Target if part not in NOT_LOADED[other]]
            instead = f", or give --target {elsewhere[0]}" if elsewhere else ""
            raise ConfigError(f"{OPTIONS[part]} with --target {target.value}: {reason}; leave it out{instead}")
        reason = NOT_WRITTEN.get(format, {}).get(part)
        if reason is not None:
            raise ConfigError(
                f"{OPTIONS[part]} with --format {format}: {reason}; leave it out, or give --format compressed-tensors"
            )


def fixed_choice(bits: int, group_sizes: Sequence[int], d_in: int) -> Choice:
    """The one choice of a part: the first group size that divides its width, else one scale a row."""
    choices = [Choice(bits=bits, group_size=size) for size in (*group_sizes, -1)]
    return next(choice for choice in choices if choice.fits(d_in))
