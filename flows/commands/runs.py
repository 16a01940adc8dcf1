"""``lrpq runs`` and ``lrpq status``: what is in the store, what is done, what is left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from flows.commands import options as o


def runs(*, store: o.Store = None, as_json: o.AsJson = False) -> None:
    """List the runs in the store."""
    from flows.config import default_store
    from flows.config_file import absolute_store
    from flows.output import open_console, stdout_kept_free, write_document
    from flows.prefect_server import quiet_prefect

    quiet_prefect()
    where = absolute_store(store or default_store())
    with stdout_kept_free():
        from flows.catalogue import list_runs

        found = list_runs(where)
    if as_json:
        write_document({"store": where, "runs": found})
        return
    console = open_console()
    if not found:
        console.print(f"no runs in {where}", markup=False)
        return
    console.print(_table(found, title=f"runs in {where}"))


def status(
    run: Annotated[str, typer.Argument(help="Run id; `lrpq runs` lists them.", metavar="RUN")],
    *,
    store: o.Store = None,
    as_json: o.AsJson = False,
) -> None:
    """Show what of RUN is done."""
    from flows.config import default_store
    from flows.config_file import absolute_store
    from flows.output import open_console, stdout_kept_free, write_document
    from flows.prefect_server import quiet_prefect
    from flows.run_config import check_run_id

    check_run_id(run)
    quiet_prefect()
    with stdout_kept_free():
        from flows.catalogue import run_status

        found = run_status(absolute_store(store or default_store()), run)
    if as_json:
        write_document(found)
        return
    console = open_console()
    console.print(_table(found["stages"], title=f"run {found['run_id']}"))
    configuration = json.dumps(found["configuration"], indent=2, default=str)
    console.print(f"configuration {configuration}", markup=False, highlight=False)
    if found.get("results"):
        console.print(_table(found["results"], title="results"))


def _table(rows: Sequence[Mapping[str, Any]], *, title: str) -> Any:
    """One column a plain value of the rows; nested ones are left to --json."""
    from rich.table import Table
    from rich.text import Text

    names: dict[str, None] = {}
    for row in rows:
        names |= {name: None for name, value in row.items() if _is_plain(value)}
    table = Table(title=Text(title), title_justify="left")
    for name in names:
        table.add_column(Text(name.replace("_", " ")), overflow="fold")
    for row in rows:
        table.add_row(*(Text(_shown(row.get(name))) for name in names))
    return table


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str | int) for item in value)
    return not isinstance(value, dict)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
