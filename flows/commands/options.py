"""Options of the commands: flag, help and default come from the field of the configuration that they set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from flows.config import CompressConfig
from flows.config_file import fields_of, flag_of
from flows.presets import FAST
from flows.sections import PER_CHANNEL, Flag
from lrpq.errors import ConfigError

_FIELDS = {".".join(path): field for path, field in fields_of(CompressConfig)}


def _flag(path: str) -> Flag:
    flag = flag_of(_FIELDS[path])
    if flag is None:
        raise KeyError(f"{path} has no option")
    return flag


def option(path: str) -> Any:
    """Describe the option of a field, such as ``run.seed``."""
    field = _FIELDS[path]
    flag = _flag(path)
    default = field.default
    shown = None
    if default not in (None, ()) and not field.is_required() and field.default_factory is None:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    shown = flag.name if default is True and flag.off else shown
    text = " ".join((field.description or "").split())
    text += f" [default: {shown}]" if shown not in (None, "False") else ""
    if not flag.name.startswith("--"):
        return typer.Argument(help=text, metavar=flag.name, show_default=False)
    names = [f"{flag.name}/{flag.off}" if flag.off else flag.name]
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return typer.Option(*names, help=text, metavar="|".join(choices) or None, show_default=False)


Model = Annotated[str | None, option("run.model")]
Calibration = Annotated[str | None, option("run.calibration.source")]
CalibrationWindows = Annotated[int | None, option("run.calibration.num_windows")]
CalibrationLength = Annotated[int | None, option("run.calibration.length")]
HeldOut = Annotated[int | None, option("run.calibration.held_out")]
TextColumn = Annotated[str | None, option("run.calibration.text_column")]
Images = Annotated[str | None, option("run.images.source")]
CalibrationImages = Annotated[int | None, option("run.images.num_images")]
Activations = Annotated[str | None, option("run.images.activations")]
Bits = Annotated[str | None, option("run.candidates.bits")]
GroupSize = Annotated[str | None, option("run.candidates.group_sizes")]
Scales = Annotated[str | None, option("run.candidates.scales")]
CostRows = Annotated[int | None, option("run.candidates.cost_rows")]
QuantizeHead = Annotated[int | None, option("run.candidates.quantize_head")]
QuantizeEmbeddings = Annotated[int | None, option("run.candidates.quantize_embeddings")]
Relevance = Annotated[str | None, option("run.relevance")]
GradientsEvery = Annotated[int | None, option("run.gradients_every")]
Seed = Annotated[int | None, option("run.seed")]
Rotate = Annotated[str | None, option("run.rotate")]
Dtype = Annotated[str | None, option("run.dtype")]
Threads = Annotated[int | None, option("run.threads")]
Budget = Annotated[float | None, option("plan.budget_bits")]
BudgetBytes = Annotated[str | None, option("plan.budget_bytes")]
MaxKL = Annotated[float | None, option("plan.max_kl")]
Keep = Annotated[list[str] | None, option("plan.keep")]
Target = Annotated[str | None, option("plan.target")]
Codes = Annotated[str | None, option("plan.codes")]
Format = Annotated[str | None, option("plan.format")]
TensorParallel = Annotated[int | None, option("plan.tensor_parallel")]
Solver = Annotated[str | None, option("plan.solver")]
Refine = Annotated[str | None, option("plan.refine")]
Share = Annotated[str | None, option("plan.share")]
Reconstruct = Annotated[bool | None, option("plan.reconstruct")]
Evaluation = Annotated[str | None, option("evaluation.source")]
EvaluationWindows = Annotated[int | None, option("evaluation.num_windows")]
EvaluationLength = Annotated[int | None, option("evaluation.length")]
EvaluationImages = Annotated[int | None, option("evaluation.num_images")]
HeatMaps = Annotated[int | None, option("evaluation.heat_maps")]
Top1 = Annotated[bool | None, option("evaluation.top1")]
Control = Annotated[bool | None, option("evaluation.control")]
Forecast = Annotated[bool | None, option("evaluation.forecast")]
Evaluate = Annotated[bool | None, option("evaluation.enabled")]
Workers = Annotated[int | None, option("cluster.workers")]
Device = Annotated[str | None, option("cluster.device")]
LowMemory = Annotated[bool | None, option("cluster.low_memory")]
Address = Annotated[str | None, option("cluster.address")]
Output = Annotated[Path | None, option("output")]
Overwrite = Annotated[bool | None, option("overwrite")]
Store = Annotated[str | None, option("store")]
RunId = Annotated[str | None, option("run_id")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        help="Multiple-choice questions, one JSON object a line (ctx, choices, label), or a task of "
        "lm-evaluation-harness (needs lrpq[tasks], the hub and memory for a whole model). Can be given again.",
        metavar="FILE.jsonl|lm-eval:NAME[:LIMIT]",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML or JSON file of settings; options override it.", metavar="FILE"),
]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="Bits from an eighth of the gradients and no refinement: less time, lower quality. Short for "
        + " ".join(f"{_flag(path).name} {value}" for path, value in FAST.items())
        + ", each of which can be given.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, progress as JSON lines on stderr.")]


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"run.seed": 1}`` into ``{"run": {"seed": 1}}``, without what was not given."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        if value is None:
            continue
        *sections, name = path.split(".")
        below = tree
        for section in sections:
            below = below.setdefault(section, {})
        below[name] = str(value) if isinstance(value, Path) else value
    return tree


def presets(values: Mapping[str, Any], *, fast: bool) -> dict[str, Any]:
    """What was given, and what ``--fast`` stands for where nothing was."""
    return {path: FAST.get(path) if fast and value is None else value for path, value in values.items()}


def whole_numbers(text: str | None, *, flag: str) -> list[int] | None:
    """Read ``2,3,4``; for group sizes ``channel`` is one scale a row, for activations ``none`` is no width at all.

    Raises:
        ConfigError: not a list of whole numbers.
    """
    if text is None:
        return None
    if flag == "--activations" and text.strip() == "none":
        return []
    items = [item.strip() for item in text.split(",")]
    try:
        return [PER_CHANNEL if item == "channel" and flag == "--group-size" else int(item) for item in items]
    except ValueError:
        raise ConfigError(f"{flag} {text!r}: expected whole numbers with commas between them, such as 2,3,4") from None
