"""How a command reports: progress on stderr while it works, then a table or one JSON document on stdout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from flows.closing import print_closing, print_evaluation
from flows.output import open_console, stdout_kept_free, write_document
from flows.prefect_server import quiet_prefect
from flows.progress import Progress, open_progress
from flows.task_table import print_tasks


class Report:
    """Takes the result of a command; it is shown when the work has been closed."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.result: Mapping[str, Any] = {}
        self.is_evaluation = False

    def closing(self, manifest: Mapping[str, Any]) -> None:
        """Take the manifest of a compression."""
        self.result = manifest

    def evaluation(self, scores: Mapping[str, Any]) -> None:
        """Take what an evaluation measured."""
        self.result, self.is_evaluation = scores, True


@contextmanager
def reported(*, as_json: bool) -> Iterator[Report]:
    """Work inside reports progress; its result is shown at the end, nothing on exceptions."""
    quiet_prefect()
    with ExitStack() as stack:
        if as_json:
            stack.enter_context(stdout_kept_free())
        report = Report(stack.enter_context(open_progress(as_json=as_json)))
        yield report
    if as_json:
        write_document(report.result)
    elif report.is_evaluation:
        if measured := report.result.get("evaluation"):
            print_evaluation(measured, open_console())
        if tasks := report.result.get("tasks"):
            print_tasks(tasks, open_console())
    else:
        print_closing(report.result, open_console())
