"""What a compression reports: the contents of lrpq.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.config import CompressConfig
from lrpq import __version__
from lrpq.allocate.plan import Plan
from lrpq.model.layers import Choice, LinearSpec
from lrpq.quant.packing import storage_bits
from lrpq.quant.trellis import share_of_grid
from tasks.artifacts import StageFolder
from tasks.candidates import CandidatesJob
from tasks.store.keys import code_digest


def manifest_of(
    config: CompressConfig,
    plan: Plan,
    *,
    run_id: str,
    environment: Mapping[str, str],
    specs: Sequence[LinearSpec],
    rows: Sequence[Mapping[str, Any]],
    degraded: Mapping[str, int],
) -> dict[str, Any]:
    """Everything that is known before the checkpoint is written; sizes, quality and times are added to it."""
    wanted = config.plan
    return {
        "lrpq": __version__,
        "run_id": run_id,
        "model": config.run.model,
        "configuration": json.loads(config.model_dump_json(exclude={"store", "output"})),
        "environment": dict(environment),
        "budget": {
            "asked_bits": wanted.budget_bits,
            "asked_bytes": wanted.budget_bytes,
            "predicted_kl_nats": plan.cost_nats,
            "bound_nats": plan.bound_nats,
            "gap": plan.gap,
            "method": plan.method.value,
        },
        "modules": modules_json(specs, plan.choices, rows),
        "kept_16bit": list(plan.names_at_16),
        "kept_because": dict(plan.left_at_16),
        "degraded": dict(degraded),
    }


def content_key(
    codes: StageFolder | CandidatesJob,
    plan: Plan,
    *,
    head: CandidatesJob | None,
    fingerprint: str,
    format: str,
    writer: str,
) -> str:
    """Names the checkpoint's content: where its codes come from, which of them it takes, and the code that writes it.

    ``writer`` is the module of that code.
    """
    origin = codes.key if isinstance(codes, StageFolder) else codes.folder.key
    origin += "" if head is None else f" {head.folder.key}"
    parts = [origin, choices_json(plan.choices), fingerprint, format, code_digest(writer)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def model_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def choices_json(choices: Mapping[str, Choice | None]) -> dict[str, Any]:
    """Choices as JSON: module -> [bits, group size, bits of a scale], of trellis codes also "trellis"; or null."""
    return {name: None if choice is None else _choice_json(choice) for name, choice in choices.items()}


def _choice_json(choice: Choice) -> list[Any]:
    return [choice.bits, choice.group_size, choice.scale_bits, *(["trellis"] if choice.trellis else [])]


def modules_json(
    specs: Sequence[LinearSpec], choices: Mapping[str, Choice | None], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One row a module for the manifest: what it got and what that was expected to cost."""
    costs = {(row["name"], row["bits"], row["group_size"], row["scale_bits"]): row for row in rows}
    found = []
    for spec in specs:
        choice = choices[spec.name]
        row = None if choice is None else costs[spec.name, choice.bits, choice.group_size, choice.scale_bits]
        found.append(
            {
                "name": spec.name,
                "kind": spec.kind,
                "block": spec.block,
                "bits": 16 if choice is None else choice.bits,
                "group_size": None if choice is None else choice.group_size,
                "scale_bits": None if choice is None else choice.scale_bits,
                "codes": None if choice is None else "trellis" if choice.trellis else "uniform",
                "num_weights": spec.num_weights,
                "storage_bits": 16 * spec.num_weights
                if choice is None
                else storage_bits(spec.d_out, spec.d_in, choice),
                "cost_nats": 0.0 if row is None or choice is None else row["cost_nats"] * share_of_grid(choice),
            }
        )
    return found
