"""Heat maps of an image classifier's run: a stage, files in the output folder, a picture in Prefect's UI."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from flows import artifacts
from flows.run import Run
from lrpq.relevance.patches import patch_size
from tasks import heat_maps
from tasks.cluster import Pool
from tasks.heat_maps import HeatMaps, HeatMapsJob, read_heat_maps
from tasks.images.heat import beside, png, stacked

FOLDER = "heat-maps"
SHOWN = 8
"""Images in Prefect's picture at most."""
NAME_CHARS = 40
"""Of a class, in a file's name."""
PICTURE = re.compile(r"\.?\d{3}(-[a-z0-9-]*)?\.png(\.[0-9a-f]{32})?")
"""A picture, or what a killed run left of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatReport:
    """Heat maps and what is said of them."""

    found: HeatMaps
    config: PreTrainedConfig
    """Of the model."""
    relevance: str
    """The pass that explains."""

    @property
    def document(self) -> dict[str, Any]:
        """For the manifest: by image its file, the likeliest class, its logit, and the relevance of all patches and of
        the special tokens."""
        images = []
        for i, (index, logit) in enumerate(zip(self.found.classes.tolist(), self.found.logits.tolist(), strict=True)):
            name = str(self.config.id2label.get(index, index))
            slug = artifacts.slug(name)[:NAME_CHARS].strip("-")
            images.append(
                {
                    "file": f"{FOLDER}/{i:03d}{'-' if slug else ''}{slug}.png",
                    "class": index,
                    "name": name,
                    "logit": logit,
                    "patches": float(self.found.patches[i].double().sum()),
                    "special_tokens": float(self.found.special[i].double().sum()),
                }
            )
        return {"relevance": self.relevance, "images": images}

    def write(self, output: Path) -> None:
        """Write every picture that is not there already, each in one step; those of other runs are removed.

        Raises:
            OSError: a picture cannot be written.
        """
        named = {Path(entry["file"]).name for entry in self.document["images"]}
        for left in (output / FOLDER).glob("*.png*"):
            if PICTURE.fullmatch(left.name) and left.name not in named:
                left.unlink()
        for entry, picture in zip(self.document["images"], self._pictures(len(self.found.pixels)), strict=True):
            path, written = output / entry["file"], png(picture)
            if path.is_file() and path.read_bytes() == written:
                continue
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            temporary.write_bytes(written)
            temporary.replace(path)

    def publish(self) -> None:
        """One picture of the first images, one below the other."""
        names = [f"{entry['name']} ({entry['logit']:.2f})" for entry in self.document["images"][:SHOWN]]
        about = (
            f"Relevance ({self.relevance}) of patches for the likeliest class; from above, with its logit: "
            + ", ".join(names)
        )
        artifacts.publish_png(png(stacked(self._pictures(SHOWN))), key=FOLDER, description=about)

    def _pictures(self, count: int) -> list[Tensor]:
        size = patch_size(self.config)
        pairs = zip(self.found.pixels[:count], self.found.patches[:count], strict=True)
        return [beside(pixels, patches, patch_size=size) for pixels, patches in pairs]


def run_heat_maps(run: Run, pool: Pool, job: HeatMapsJob, config: PreTrainedConfig) -> HeatReport:
    """The stage; its result is small and comes back whole."""
    label = heat_maps.STAGE
    if run.stored(job.folder, label) is None:

        def attempt() -> None:
            with run.timed(label, 1, "pass"):
                run.step(label, lambda: pool.get([pool.submit(0, heat_maps.explain, job)]))
                run.advance(label)

        run.survive(pool, label, attempt)
        run.finish(job.folder, label, {"images": job.count})
    found = read_heat_maps(run.store, job.folder)
    return HeatReport(found=found, config=config, relevance=job.running.value)
