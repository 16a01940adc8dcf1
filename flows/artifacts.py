"""What a run leaves in Prefect's UI: progress of every stage, bits per layer, cost curves, the result.

The run does not depend on any of it: where the server does not answer, the artifact is missing and the run goes on.
"""

from __future__ import annotations

import base64
import io
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run

from flows.closing import (
    activations_line,
    budget_line,
    codes_line,
    forecast_line,
    guard_line,
    reconstruction_line,
    rotation_line,
    shown_bytes,
)
from flows.progress import Progress, shown_seconds

UPDATE_SECONDS = 2.0
"""A stage's progress is sent at most this often: an update takes 20 ms, and a stage may have thousands of units."""
UNREACHABLE = (httpx.HTTPError, PrefectException, OSError, RuntimeError, ValueError)
COLUMNS = ("name", "bits", "group_size", "codes", "num_weights", "cost_nats")
DOTS_PER_INCH = 110


class ArtifactProgress:
    """Progress that also keeps one progress artifact a stage up to date."""

    def __init__(self, inner: Progress, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._inner = inner
        self._clock = clock
        self._stages: dict[str, _Stage] = {}

    def stage(self, name: str, total: int, unit: str = "block") -> None:
        """See Progress."""
        self._inner.stage(name, total, unit)
        made = _attempt(lambda: create_progress_artifact(0.0, key=f"progress-{slug(name)}", description=name))
        if isinstance(made, UUID):
            self._stages[name] = _Stage(artifact=made, total=max(total, 1), sent=self._clock())

    def advance(self, name: str, detail: str = "") -> None:
        """See Progress."""
        self._inner.advance(name, detail)
        stage = self._stages.get(name)
        if stage is None:
            return
        stage.done += 1
        if self._clock() - stage.sent >= UPDATE_SECONDS and stage.done < stage.total:
            stage.sent = self._clock()
            share = 100.0 * stage.done / stage.total
            text = f"{name}: {stage.done} of {stage.total}" + (f", {detail}" if detail else "")
            _attempt(lambda: update_progress_artifact(stage.artifact, share, description=text))

    def done(self, name: str, *, seconds: float, reused: bool) -> None:
        """See Progress."""
        self._inner.done(name, seconds=seconds, reused=reused)
        stage = self._stages.pop(name, None)
        if stage is not None:
            text = f"{name}: done in {shown_seconds(seconds)}"
            _attempt(lambda: update_progress_artifact(stage.artifact, 100.0, description=text))

    def note(self, text: str) -> None:
        """See Progress."""
        self._inner.note(text)

    def tell(self, text: str) -> None:
        """See Progress."""
        self._inner.tell(text)

    def left_open(self) -> None:
        """Say of stages that did not end that they did not."""
        for name, stage in self._stages.items():
            share = 100.0 * stage.done / stage.total
            text = f"{name}: stopped after {stage.done} of {stage.total}"
            _attempt(partial(update_progress_artifact, stage.artifact, share, description=text))
        self._stages.clear()


class _Stage:
    def __init__(self, *, artifact: UUID, total: int, sent: float) -> None:
        self.artifact, self.total, self.sent, self.done = artifact, total, sent, 0


@contextmanager
def shown(progress: Progress) -> Iterator[Progress]:
    """Inside, progress also goes to Prefect; stages that an exception leaves open are said to have stopped."""
    if flow_run.id is None:
        yield progress
        return
    wrapped = ArtifactProgress(progress)
    try:
        yield wrapped
    finally:
        wrapped.left_open()


def publish_costs(rows: Sequence[Mapping[str, Any]]) -> None:
    """An image of what every layer type would cost at every width: where bits are worth most."""
    if flow_run.id is not None and rows:
        image = cost_curves(rows)
        _attempt(lambda: create_image_artifact(image, key="cost-curves", description="Expected loss by layer type"))


def publish_png(picture: bytes, *, key: str, description: str) -> None:
    """An image that is a PNG file already."""
    if flow_run.id is not None:
        _attempt(lambda: create_image_artifact(_url_of(picture), key=key, description=description))


def publish(manifest: Mapping[str, Any]) -> None:
    """Table and image of bits per layer, and the result in words."""
    if flow_run.id is None:
        return
    run_id = manifest["run_id"]
    table = [{column: module.get(column) for column in COLUMNS} for module in manifest["modules"]]
    _attempt(lambda: create_table_artifact(key="bits-per-layer", table=table, description=f"Run {run_id}"))
    if manifest.get("activations"):
        places = [dict(place) for place in manifest["activations"]["places"]]
        about = f"Bits of activations, run {run_id}"
        _attempt(lambda: create_table_artifact(key="bits-of-activations", table=places, description=about))
    image = bits_per_layer(manifest["modules"])
    _attempt(lambda: create_image_artifact(image, key="bits-by-block", description=f"Bits by block, run {run_id}"))
    text = result_text(manifest)
    _attempt(lambda: create_markdown_artifact(text, key="result", description=f"Run {run_id}"))


def result_text(manifest: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = [f"# {manifest['model']}", "", budget_line(manifest["budget"]), ""]
    if line := codes_line(manifest):
        lines += [line, ""]
    if manifest.get("rotation"):
        lines += [rotation_line(manifest["rotation"]), ""]
    measured = manifest.get("evaluation")
    if manifest.get("activations"):
        lines += [activations_line(manifest["activations"]), ""]
    if manifest.get("reconstruction"):
        lines += [reconstruction_line(manifest["reconstruction"]), ""]
    if measured:
        images = "images" in measured
        lines.append("| | top-1 | KL, nats an image |" if images else "| | perplexity | KL, nats a token |")
        lines.append("|---|---|---|")
        for name in ("reference", "control", "lrpq"):
            scores = measured.get(name)
            if scores:
                lines.append(f"| {name} | {_quality(scores)} | {scores['kl_nats']:.4f} |")
        lines.append("")
    if manifest.get("forecast"):
        lines += [forecast_line(manifest["forecast"]), ""]
    if manifest.get("guard"):
        lines += [guard_line(manifest["guard"]), ""]
    sizes = manifest["bytes"]
    lines.append(f"{shown_bytes(sizes['original'])} to {shown_bytes(sizes['compressed'])}")
    lines += [f"- warning: {text}" for text in manifest.get("warnings", ())]
    return "\n".join(lines) + "\n"


def _quality(scores: Mapping[str, Any]) -> str:
    """Perplexity, or top-1 of images that have labels."""
    if "perplexity" in scores:
        return f"{scores['perplexity']:.3f}"
    return "" if scores["top1"] is None else f"{scores['top1']:.2%}"


def cost_curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """Data URL of a plot: expected loss of all layers of a type (nats a token) at every width."""
    curves: dict[str, dict[tuple[int, int], float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        kind = str(row["name"]).rsplit(".", 1)[-1]
        curves[kind][int(row["bits"]), int(row["group_size"])] += float(row["cost_nats"])
    figure, axes = _figure()
    for kind, costs in curves.items():
        widths = sorted({bits for bits, _ in costs})
        best = [min(cost for (bits, _), cost in costs.items() if bits == width) for width in widths]
        axes.plot(widths, [max(cost, 1e-12) for cost in best], marker="o", label=kind)
    axes.set_yscale("log")
    axes.set_xlabel("bits a code")
    axes.set_ylabel("expected loss, nats a token")
    axes.legend(fontsize=8)
    return _data_url(figure)


def bits_per_layer(modules: Sequence[Mapping[str, Any]]) -> str:
    """Data URL of a plot: bits of every layer, blocks from left to right, layer types from top to bottom.

    Experts of a block are shown by the mean over them.
    """
    kinds = list(dict.fromkeys(str(module["kind"]) for module in modules))
    blocks = max(int(module["block"]) for module in modules) + 1
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for module in modules:
        found[kinds.index(str(module["kind"])), int(module["block"])].append(int(module["bits"]))
    grid = [[float("nan")] * blocks for _ in kinds]
    for (kind, block), bits in found.items():
        grid[kind][block] = sum(bits) / len(bits)
    figure, axes = _figure()
    drawn = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest", vmin=2, vmax=8)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_xlabel("block")
    figure.colorbar(drawn, label="bits a code (8 and more)")
    return _data_url(figure)


def slug(name: str) -> str:
    """Prefect's keys are of a-z, 0-9 and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    return figure, figure.add_subplot()


def _data_url(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return _url_of(buffer.getvalue())


def _url_of(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _attempt(action: Callable[[], Any]) -> Any:
    """What Prefect answers; None where it does not."""
    try:
        return action()
    except UNREACHABLE:
        return None
