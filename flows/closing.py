"""What a person reads in the end: budget, bits per layer type, quality side by side, seconds per stage."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.progress import shown_seconds

NOTHING_COMPUTED = "nothing to compute: every stage was found in the store"
UNQUANTIZED_BITS = 16
WRITING_STAGES = frozenset({"assemble"})
"""Stages that copy what the store holds: they compute nothing."""
DEGRADATIONS: Mapping[str, str] = {
    "not_positive_definite": "Hessians were not positive definite and got more damping",
    "dead_inputs": "inputs were never active; their weights were rounded to nearest",
    "experts_pooled": "expert layers saw too few tokens and were quantized by those of all experts of their block",
    "experts_without_tokens": "expert layers saw too few tokens and were rounded to nearest",
    "without_relevance": "modules are reached by no gradient; their tokens were weighed alike",
    "kept_uniform": "result was worse than the uniform candidate on held-out windows, which was written instead",
    "refine_damping_steps": "times the damping was raised tenfold in the refinement",
    "correction_rejected": "corrections made a block worse and were left out",
    "correction_rejected_rows": "rows of weights were left uncorrected, for the correction made them worse",
    "reconstruction_diverged": "blocks stopped being rebuilt early, for their gradients were not finite",
    "modules_without_streams": "modules have uniform codes, for their rows do not make segments of a trellis",
    "modules_with_rows_alone": "modules were rounded row by row, for making up for each other made the rows worse",
}
"""Counter of the manifest -> what it counts; others are shown by their names."""
TEXT_MEASURES = (("perplexity", "perplexity", ".3f"), ("same top token", "top1", ".2%"))
IMAGE_MEASURES = (("top-1", "top1", ".2%"), ("same top class", "agreement", ".2%"))
"""Name, field and form of what stands before and behind the KL divergence."""
TOTALS = frozenset({"rows"})
"""Counters that only say of how many."""


def print_closing(manifest: Mapping[str, Any], console: Console) -> None:
    """Print the closing tables of a compression; what the manifest lacks is left out."""
    console.print(Group(*_closing(manifest)))


def print_evaluation(evaluation: Mapping[str, Any], console: Console) -> None:
    """Print perplexity and KL divergence of what was measured."""
    console.print(quality_table(evaluation, sizes={}))


def computed_nothing(manifest: Mapping[str, Any]) -> bool:
    """Whether every stage was found in the store."""
    if "computed_nothing" in manifest:
        return bool(manifest["computed_nothing"])
    stages = set(manifest.get("seconds", {})) - WRITING_STAGES
    return bool(stages) and stages <= set(manifest.get("reused", ()))


def _closing(manifest: Mapping[str, Any]) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(f"{manifest.get('model', '')}  run {manifest.get('run_id', '')}", style="bold")]
    if budget := manifest.get("budget"):
        parts.append(Text(budget_line(budget)))
    if line := codes_line(manifest):
        parts.append(Text(line))
    if rotation := manifest.get("rotation"):
        parts.append(Text(rotation_line(rotation)))
    if quantized := manifest.get("activations"):
        parts.append(Text(activations_line(quantized)))
    if heat := manifest.get("heat_maps"):
        parts.append(Text(heat_maps_line(heat)))
    if modules := manifest.get("modules"):
        parts.append(bits_table(modules, kept=manifest.get("kept_16bit", ())))
    parts.append(quality_table(manifest.get("evaluation", {}), sizes=manifest.get("bytes", {})))
    if expected := manifest.get("forecast"):
        parts.append(Text(forecast_line(expected)))
    if rebuilt := manifest.get("reconstruction"):
        parts.append(Text(reconstruction_line(rebuilt)))
    if guard := manifest.get("guard"):
        parts.append(Text(guard_line(guard)))
    if seconds := manifest.get("seconds"):
        parts.append(seconds_table(seconds, reused=manifest.get("reused", ())))
    for counter, count in manifest.get("degraded", {}).items():
        if count and counter not in TOTALS:
            parts.append(Text(f"degraded: {count} {DEGRADATIONS.get(counter, counter)}", style="yellow"))
    parts += [Text(f"warning: {text}", style="yellow") for text in manifest.get("warnings", ())]
    if computed_nothing(manifest):
        parts.append(Text(NOTHING_COMPUTED, style="bold green"))
    return parts


def budget_line(budget: Mapping[str, Any]) -> str:
    """Say what was asked for, what was reached and how far from the best possible it may be."""
    if search := budget.get("search"):
        asked = f"KL of at most {search['max_kl']:g}: {search['kl_nats']:.4f} held out at {search['bits']:.3f} bits"
    elif budget.get("asked_bytes") is not None:
        asked = f"budget {shown_bytes(budget['asked_bytes'])}"
    else:
        asked = f"budget {budget['asked_bits']:g} bits a weight"
        if budget.get("shared") is not None:
            unit = "bits" if budget["shared"] == "bits" else "bit operations"
            asked += f" and {budget['asked_activation_bits']} an activation, {unit} together"
    parts = [asked]
    if budget.get("reached_bits") is not None:
        parts.append(f"reached {budget['reached_bits']:.4f} bits")
    if budget.get("reached_bytes") is not None:
        parts.append(shown_bytes(budget["reached_bytes"]))
    if budget.get("predicted_kl_nats") is not None:
        parts.append(f"expected loss {budget['predicted_kl_nats']:.4g} nats a token")
    if budget.get("bound_nats") is not None:
        parts.append(f"at least {budget['bound_nats']:.4g} under this budget")
    if budget.get("gap") is not None:
        parts.append(f"gap {budget['gap']:.2%}")
    return ", ".join(parts)


def guard_line(guard: Mapping[str, Any]) -> str:
    """Say what the result was held against before it was written."""
    windows, unit = ("images", "an image") if guard.get("of") == "images" else ("windows", "a token")
    error = guard["lrpq"].get("difference_standard_error")
    difference = guard["lrpq"]["kl_nats"] - guard["uniform"]["kl_nats"]
    paired = "" if error is None else f" (difference {difference:+.4f} +- {error:.4f})"
    return (
        f"held-out calibration {windows} ({guard['windows']}): KL {guard['lrpq']['kl_nats']:.4f} nats {unit}, uniform "
        f"{guard['uniform_choice']} {guard['uniform']['kl_nats']:.4f}{paired}; written: {guard['kept']}"
    )


def forecast_line(expected: Mapping[str, Any]) -> str:
    """Say what was expected before codes were refined, and from what."""
    low, high = expected["range_nats"]
    measured = f"{expected['candidates']['kl_nats']:.4f} on {expected['windows']} x {expected['length']} tokens"
    rejected = "" if expected.get("written", True) else "; of lrpq's plan, which is not what was written"
    return (
        f"forecast before refinement: KL {expected['kl_nats']:.3f} nats a token, going by other models {low:.3f} to "
        f"{high:.3f} ({expected['factor']:g} times the candidates' {measured} of {expected['source']}){rejected}"
    )


def reconstruction_line(rebuilt: Mapping[str, Any]) -> str:
    """Say how many blocks were rebuilt, and what became of the errors of these."""
    changed = [block for block in rebuilt["blocks"] if block["changed"]]
    text = f"reconstruction: {rebuilt['changed']} of {rebuilt['num_blocks']} blocks changed"
    if changed:
        before, after = (sum(float(block[when]) for block in changed) for when in ("before", "after"))
        text += f", their held-out errors {before:.4g} -> {after:.4g} nats an image in all"
    scores = rebuilt.get("held_out")
    if changed and scores is not None:
        kept = "kept" if rebuilt["helps"] else "left out"
        both = f"KL {scores['rounded']['kl_nats']:.4g} -> {scores['rebuilt']['kl_nats']:.4g} on held-out images"
        text += f"; {both}: {kept}"
    return text


def activations_line(activations: Mapping[str, Any]) -> str:
    """Say how wide activations are."""
    counts = Counter(int(place["bits"]) for place in activations["places"])
    shown = ", ".join(f"{count} at {bits}" for bits, count in sorted(counts.items()))
    return (
        f"activations: {activations['average_bits']:.3f} bits on average over all values of an image; places: {shown}"
    )


def heat_maps_line(heat: Mapping[str, Any]) -> str:
    """Say where the heat maps are."""
    images = heat["images"]
    folder = str(images[0]["file"]).rsplit("/", 1)[0]
    return f"heat maps ({heat['relevance']}) of {len(images)} calibration images in {folder}/ of the output folder"


def rotation_line(rotation: Mapping[str, Any]) -> str:
    """Say that the model was rotated, and what it costs."""
    text = f"rotated: {rotation['kind']}, the residual stream and the values of every block"
    if rotation["untied_head"]:
        text += f"; the head, tied before, is stored beside the embedding: {shown_bytes(rotation['added_bytes'])} more"
    return text


def codes_line(manifest: Mapping[str, Any]) -> str:
    """What codes are, where some are a trellis's, and what their format wants of a reader; else empty."""
    modules = manifest.get("modules", ())
    number = sum(module.get("codes") == "trellis" for module in modules)
    packed = manifest.get("configuration", {}).get("plan", {}).get("format") == "trellis"
    parts = [f"trellis codes in {number} of {len(modules)} modules"] if number else []
    if packed:
        parts.append("import lrpq.loading before from_pretrained, which else refuses its type")
    return "; ".join(parts)


def bits_table(modules: Sequence[Mapping[str, Any]], *, kept: Sequence[str] = ()) -> Table:
    """Layer type x bits -> number of modules, and the mean of all-in bits over the type's weights.

    ``kept`` names modules left at 16 bits that are not among ``modules``.
    """
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    storage: dict[str, int] = defaultdict(int)
    weights: dict[str, int] = defaultdict(int)
    for module in modules:
        counts[module["kind"]][int(module["bits"])] += 1
        storage[module["kind"]] += int(module["storage_bits"])
        weights[module["kind"]] += int(module["num_weights"])
    listed = {module["name"] for module in modules}
    for name in kept:
        if name not in listed:
            counts[name.rsplit(".", 1)[-1]][UNQUANTIZED_BITS] += 1
    widths = sorted({bits for kind in counts.values() for bits in kind})
    table = Table(title="modules by layer type and bits", title_justify="left")
    table.add_column("layer type")
    for bits in widths:
        table.add_column(f"{bits}", justify="right")
    table.add_column("all-in bits", justify="right")
    for kind, by_bits in counts.items():
        mean = f"{storage[kind] / weights[kind]:.3f}" if weights[kind] else f"{UNQUANTIZED_BITS}"
        table.add_row(kind, *(str(by_bits[bits] or "") for bits in widths), mean)
    totals = (str(sum(kind[bits] for kind in counts.values())) for bits in widths)
    all_weights = sum(weights.values())
    mean = f"{sum(storage.values()) / all_weights:.3f}" if all_weights else ""
    table.add_section()
    table.add_row("all", *totals, mean)
    return table


def quality_table(evaluation: Mapping[str, Any], *, sizes: Mapping[str, Any]) -> Table:
    """Original, uniform control and lrpq side by side: bytes, perplexity, KL divergence, agreement."""
    control = evaluation.get("control")
    columns: list[tuple[str, Mapping[str, Any], Any]] = [
        ("original", evaluation.get("reference", {}), sizes.get("original"))
    ]
    if control:
        columns.append((str(control.get("label", "control")), control, None))
    ours = "checkpoint" if "checkpoint" in evaluation else "lrpq"
    columns.append((ours, evaluation.get(ours, {}), sizes.get("compressed")))
    table = Table(title="quality", title_justify="left")
    table.add_column("")
    for name, _, _ in columns:
        table.add_column(name, justify="right")
    images = "images" in evaluation
    measures = IMAGE_MEASURES if images else TEXT_MEASURES
    divergence = "KL (nats an image)" if images else "KL (nats a token)"
    rows: list[tuple[str, list[str]]] = [
        ("bytes", ["" if size is None else shown_bytes(size) for _, _, size in columns]),
        ("all-in bits", [_number(scores, "all_in_bits", ".3f") for _, scores, _ in columns]),
        *((name, [_number(scores, field, form) for _, scores, _ in columns]) for name, field, form in measures[:1]),
        (divergence, [_divergence(scores) for _, scores, _ in columns]),
        *((name, [_number(scores, field, form) for _, scores, _ in columns]) for name, field, form in measures[1:]),
    ]
    for name, cells in rows:
        if any(cells):
            table.add_row(name, *cells)
    return table


def seconds_table(seconds: Mapping[str, float], *, reused: Sequence[str]) -> Table:
    """Seconds per stage; what was found in the store is marked."""
    table = Table(title="time", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("")
    for stage, spent in seconds.items():
        found = stage in reused
        table.add_row(stage, f"{spent:.1f}", "reused" if found else shown_seconds(spent) if spent >= 60 else "")
    table.add_section()
    table.add_row("all", f"{sum(seconds.values()):.1f}", "")
    return table


def shown_bytes(number: float) -> str:
    """Text such as ``913 B`` or ``40.20 GB`` (powers of 1000, as budgets are written)."""
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def _number(scores: Mapping[str, Any], name: str, form: str) -> str:
    value = scores.get(name)
    return "" if value is None else format(value, form)


def _divergence(scores: Mapping[str, Any]) -> str:
    error = _number(scores, "kl_standard_error", ".4f")
    return _number(scores, "kl_nats", ".4f") + (f" +- {error}" if error else "")
