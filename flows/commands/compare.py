"""``lrpq compare``: published methods and ours, side by side on equal terms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.boundary import resumable
from flows.commands import options as o
from lrpq.errors import ConfigError


def compare(
    model: o.Model = None,
    *,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="Names with commas between them; weights:* stands for all that begin so."),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="All-in bits per quantized weight, such as 3.25,4.25.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Of calibration windows and labels, such as 0,1,2.")
    ] = None,
    calibration: o.Calibration = None,
    calibration_windows: o.CalibrationWindows = None,
    length: o.CalibrationLength = None,
    held_out_windows: o.HeldOut = None,
    text_column: o.TextColumn = None,
    evaluation: o.Evaluation = None,
    evaluation_windows: o.EvaluationWindows = None,
    evaluation_length: o.EvaluationLength = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    scales: o.Scales = None,
    codes: o.Codes = None,
    device: o.Device = None,
    output: Annotated[
        Path, typer.Option("--output", help="Folder for compare.json, pareto.csv and pareto.png.", metavar="DIR")
    ] = Path("comparison"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget the rows that lie in the folder.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="Show all methods and where they are from.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Measure published methods and lrpq's on equal terms: same model, tokens, grid, all-in bits.

    Runs in this process, block by block. Rows that lie in the output folder are kept: the same command again, or with
    more methods, budgets or seeds, measures only what is missing.
    """
    from flows.comparison import CompareConfig, ComparisonRun, listed
    from flows.config_file import absolute_model, checked
    from flows.output import open_console, write_document

    if show_list:
        if as_json:
            write_document(listed())
        else:
            from flows.comparison_table import list_table

            open_console().print(list_table(listed()))
        return
    if model is None:
        raise ConfigError("MODEL is missing: give a hub id or a folder, or --list")
    given: dict[str, Any] = o.nested(
        {
            "model": absolute_model(model),
            "methods": None if methods is None else _parts(methods),
            "budgets": _numbers(budgets, "--budgets"),
            "seeds": o.whole_numbers(seeds, flag="--seeds"),
            "calibration.source": calibration,
            "calibration.num_windows": calibration_windows,
            "calibration.length": length,
            "calibration.held_out": held_out_windows,
            "calibration.text_column": text_column,
            "evaluation.source": evaluation,
            "evaluation.num_windows": evaluation_windows,
            "evaluation.length": evaluation_length,
            "bits": o.whole_numbers(bits, flag="--bits"),
            "group_sizes": o.whole_numbers(group_size, flag="--group-size"),
            "scales": scales,
            "codes": codes,
        }
    )
    config = checked(CompareConfig, given, options=given)
    with resumable():
        from flows.comparison_table import comparison_table
        from flows.output import stdout_kept_free
        from flows.pareto import write_pareto
        from flows.preflight import check_named_folder, check_text
        from flows.progress import open_progress

        check_named_folder(model, option="MODEL")
        check_text(config.calibration.source)
        if config.evaluation.source is not None:
            check_text(config.evaluation.source)
        with stdout_kept_free(), open_progress(as_json=as_json) as progress:
            run = ComparisonRun(
                config, output.expanduser().absolute(), progress, device=device or "auto", overwrite=overwrite
            )
            document = run.run()
            write_pareto(document["table"], run.output)
        if as_json:
            write_document(document)
        else:
            open_console().print(comparison_table(document["table"]))


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str | None, flag: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in _parts(text)]
    except ValueError:
        raise ConfigError(f"{flag} {text!r}: expected numbers with commas between them, such as 3.25,4.25") from None
