"""What a profile is asked for, and the names of what it stores."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.artifacts import StageFolder
from tasks.hessian_bands import REST
from tasks.streams import StreamJob

STAGE = "profile"
TRACE = ".trace"
"""Behind a module's name beside its curvature: the trace of its Fisher information."""
ROWS = ".rows"
"""Ending of the name under which an expert's token indices lie beside its token weights."""
HESSIANS, SQUARES, INPUTS = "hessians", "squared-gradients", "inputs"
BLOCK_OBJECTS = (
    (HESSIANS, "parquet"),
    ("curvature", "safetensors"),
    ("scores", "parquet"),
    ("outputs", "parquet"),
    ("token-weights", "safetensors"),
)
"""Kind and ending of what is stored of a block."""
PLAIN_OBJECTS = BLOCK_OBJECTS[:3]
"""Of these what there is where tokens are not weighed."""
HEAD_OBJECTS = BLOCK_OBJECTS[:2]
ACTIVATION_OBJECTS = ((SQUARES, "safetensors"), (INPUTS, "safetensors"))
"""What there is besides where activations are to be quantized: squared gradients by site and token, and by site the
weighted sum of its inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileJob:
    """Parameters of the stage; the same on every worker."""

    stream: StreamJob
    folder: StageFolder
    relevance: str
    floor: float
    """Share of the mean token weight that every token gets."""
    power: float
    """Exponent of the token weights."""
    seed: int
    with_head: bool = False
    """Also what quantizing the head needs."""
    gradients_every: int = 1
    """Of how many windows one has its gradients taken; above 1 Hessians are plain and summed on the way forward
    (tasks.profile_inputs)."""
    cut: frozenset[tuple[int, str]] = frozenset()
    """(block, input site) of the sites whose Hessians are in two objects (tasks.hessian_bands)."""
    for_activations: bool = False
    """Also what quantizing activations needs. The walk is on the model as it was; with a ``stream`` whose activations
    have grids, Hessians are read as those of the model that is folded for them."""

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens are weighed by their gradients; otherwise gradients give the curvature alone."""
        return self.gradients_every == 1

    def block_objects(self, block: int) -> tuple[tuple[str, str], ...]:
        """Kind and ending of what is stored of a block."""
        if not self.weighs_tokens:
            return PLAIN_OBJECTS
        rest = ((REST, "parquet"),) if self.cut_of(block) else ()
        return BLOCK_OBJECTS + rest + (ACTIVATION_OBJECTS if self.for_activations else ())

    def cut_of(self, block: int) -> frozenset[str]:
        """Input sites of a block whose Hessians are in two objects: of plain ones none."""
        return frozenset(site for of, site in self.cut if of == block) if self.weighs_tokens else frozenset()


def chunk_name(name: str, index: int) -> str:
    """Of the second moments of some outputs of a module, in the object of all."""
    return f"{name}|{index}"
