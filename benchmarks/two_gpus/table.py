"""What two runs say, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.two_gpus.objects import Compared
from benchmarks.two_gpus.stages import Done, Stage

GIGA = 1e9
LEDGERS = (("calls", ""), ("moved", "of these, "), ("beside", "beside: "), ("moved_beside", "beside, "))
"""Fields of a ledger, and what their lines begin with."""


def stage_table(runs: Sequence[Done]) -> Iterator[str]:
    """One row a stage."""
    counts = [len(next(iter(run.stages.values())).workers) for run in runs]
    heads = [f"{n} worker{'s' if n > 1 else ''}, s" for n in counts]
    moving = [f"moving / waiting with {n}, s" for n in counts]
    peaks = [f"GB a GPU with {n}" for n in counts]
    yield "| stage | " + " | ".join([*heads, "ratio", *moving, *peaks]) + " |"
    yield "|---" * (2 + 3 * len(runs)) + "|"
    for name in runs[0].stages:
        stages = [run.stages[name] for run in runs]
        ratio = f"{stages[0].seconds / stages[-1].seconds:.2f}"
        cells = [f"{stage.seconds:.2f}" for stage in stages] + [ratio]
        cells += [f"{sum(_moved(stage)):.2f} / {sum(_waiting(stage)):.2f}" for stage in stages]
        cells += [", ".join(f"{w.peak_bytes / GIGA:.2f}" for w in stage.workers) for stage in stages]
        yield f"| {name} | " + " | ".join(cells) + " |"


def stage_line(name: str, stage: Stage) -> str:
    """A stage in one line, for as long as there is no other run to compare it with."""
    peaks = ", ".join(f"{worker.peak_bytes / GIGA:.2f}" for worker in stage.workers)
    return (
        f"{name}, {len(stage.workers)} workers: {stage.seconds:.2f} s; of each {_each(_moved(stage))} s moving bytes, "
        f"{_each(_waiting(stage))} s waiting; {peaks} GB"
    )


def call_lines(stage: Stage) -> Iterator[str]:
    """Where the stage's time went, in a line for each kind of ledger; seconds of each worker."""
    for which, head in LEDGERS:
        labels = dict.fromkeys(label for worker in stage.workers for label in getattr(worker, which))
        if labels:
            found = (f"{label} {_each(_seconds(stage, which, label))}" for label in labels)
            yield f"    {head or 'calls: '}{'; '.join(found)}"


def call_table(runs: Sequence[Done], name: str) -> Iterator[str]:
    """Where a stage's time went: calls, what moved bytes, waiting; seconds by worker."""
    yield f"| {name}: | " + " | ".join(f"with {len(run.stages[name].workers)}, s each" for run in runs) + " |"
    yield "|---" * (1 + len(runs)) + "|"
    stages = [run.stages[name] for run in runs]
    for which, head in LEDGERS:
        labels = dict.fromkeys(label for stage in stages for w in stage.workers for label in getattr(w, which))
        for label in labels:
            cells = [_each(_seconds(stage, which, label)) for stage in stages]
            yield f"| {head}{label} | " + " | ".join(cells) + " |"
    yield "| waiting, and Ray's own copies | " + " | ".join(_each(_waiting(stage)) for stage in stages) + " |"
    yield "| from the last call's end to the stage's | " + " | ".join(f"{_tail(stage):.2f}" for stage in stages) + " |"


def verdict(compared: dict[str, Compared]) -> Iterator[str]:
    """Whether the results are the same."""
    for stage, found in compared.items():
        size = f"{found.objects} objects, {found.num_bytes / GIGA:.2f} GB"
        if not found.different:
            yield f"{stage}: {size}: identical"
            continue
        yield f"{stage}: {size}: {len(found.different)} DIFFER"
        for key, how in list(found.different.items())[:8]:
            yield f"    {key.rsplit('/', 1)[-1]}: {how}"


def _seconds(stage: Stage, which: str, label: str) -> list[float]:
    """Of a label in every worker's ledger."""
    found = [getattr(worker, which).get(label, 0.0) for worker in stage.workers]
    return [entry[1] if isinstance(entry, list) else entry for entry in found]


def _moved(stage: Stage) -> list[float]:
    return [sum(worker.moved.values()) for worker in stage.workers]


def _waiting(stage: Stage) -> list[float]:
    return [stage.seconds - worker.busy for worker in stage.workers]


def _tail(stage: Stage) -> float:
    ends = [end for worker in stage.workers for name, (_, _, end) in worker.calls.items() if name != "end"]
    return stage.ended - max(ends, default=stage.ended)


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
