"""Heat maps: which patches of some calibration images speak for the class that the original model finds likeliest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lrpq.relevance.composite import Relevance
from lrpq.relevance.patches import patch_relevance
from lrpq.relevance.rules import Pass
from tasks.artifacts import StageFolder
from tasks.images.stored import read_images
from tasks.store.objects import ObjectStore
from tasks.store.opened import open_store
from tasks.store.tensors import read_tensors, write_tensors
from tasks.streams import StreamJob, open_stream
from tasks.worker import WorkerState

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

STAGE = "heat-maps"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMapsJob:
    """Parameters of the stage."""

    stream: StreamJob
    """The original and its calibration images."""
    folder: StageFolder
    count: int
    """The first images of these."""
    relevance: str
    """What weighs the run's tokens; a blend is shown by its LRP."""

    @property
    def running(self) -> Pass:
        """The pass that explains; no rule of LRP where the run uses none."""
        return Relevance(self.relevance).passes[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMaps:
    """Explanations of some images, see `lrpq.relevance.patches.PatchRelevance`."""

    pixels: Float[Tensor, "n channels height width"]
    classes: Int[Tensor, " n"]
    logits: Float[Tensor, " n"]
    patches: Float[Tensor, "n rows columns"]
    special: Float[Tensor, "n special"]


def explain(state: WorkerState, job: HeatMapsJob) -> None:
    """Find the relevance of the patches and store it with the images."""
    store, stream = open_store(job.stream.store), open_stream(state, job.stream)
    images = read_images(store, job.stream.windows)[: job.count]
    parts = []
    for batch in torch.split(images, job.stream.micro_batch):
        found = patch_relevance(stream, batch.to(stream.dtype), running=job.running)
        parts.append(
            {
                "classes": found.classes.cpu(),
                "logits": found.logits.float().cpu(),
                "patches": found.patches.float().cpu(),
                "special": found.special.float().cpu(),
            }
        )
        state.beat()
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    write_tensors(store, _key(job.folder), {"pixels": images, **tensors}, {})


def read_heat_maps(store: ObjectStore, folder: StageFolder) -> HeatMaps:
    """What ``explain`` stored."""
    return HeatMaps(**read_tensors(store, _key(folder)))


def _key(folder: StageFolder) -> str:
    return folder.object("heat-maps.safetensors")
