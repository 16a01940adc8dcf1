"""Accuracies on multiple-choice questions as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text


def print_tasks(tasks: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print the accuracies of both models."""
    console.print(tasks_table(tasks))


def tasks_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for every measure of every task: both models, their paired difference and how often they answer alike."""
    table = Table(title="tasks (+- standard error)", title_justify="left")
    for name in ("task", "questions", "chance", "measure", "original", "checkpoint", "difference", "same answer"):
        table.add_column(name, justify="left" if name in ("task", "measure") else "right")
    for name, task in tasks.items():
        chance = "" if task.get("chance") is None else f"{task['chance']:.3f}"
        first: list[RenderableType] = [Text(name), str(task["questions"]), chance]
        for measure, found in task["measures"].items():
            models = (_estimate(found[model], ".3f") for model in ("reference", "checkpoint"))
            alike = "" if found["agreement"] is None else f"{found['agreement']:.1%}"
            table.add_row(*first, measure, *models, _estimate(found["difference"], "+.3f"), alike)
            first = ["", "", ""]
    return table


def _estimate(estimate: Mapping[str, Any], form: str) -> str:
    error = estimate["standard_error"]
    return format(estimate["mean"], form) + ("" if error is None else f" +- {error:.3f}")
