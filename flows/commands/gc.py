"""``lrpq gc``: what in a store nobody needs; removed only if asked."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from flows.commands import options as o

_AGE = re.compile(r"(\d+(?:\.\d+)?)([hdw])")
_SECONDS = {"h": 3600.0, "d": 86400.0, "w": 604800.0}
SHOWN = 20


def gc(
    store: Annotated[
        str | None,
        typer.Argument(help="Folder or s3://bucket/prefix; $LRPQ_STORE if not given.", metavar="STORE"),
    ] = None,
    *,
    older_than: Annotated[
        str, typer.Option("--older-than", help="Keep what is younger: 12h, 7d, 4w; one hour at least.", metavar="AGE")
    ] = "7d",
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without this, it is only listed.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Find abandoned temporaries and objects that no finished or live run names in STORE.

    Nothing is removed without --delete. Safe beside running jobs: a run in which anything is younger than the limit
    is left alone.
    """
    from flows.closing import shown_bytes
    from flows.config import default_store
    from flows.config_file import absolute_store
    from flows.output import open_console, stdout_kept_free, write_document
    from flows.prefect_server import quiet_prefect

    limit = age_seconds(older_than)
    quiet_prefect()
    where = absolute_store(store or default_store())
    with stdout_kept_free():
        from tasks.store.garbage import find_garbage, remove_garbage
        from tasks.store.opened import open_store

        opened = open_store(where)
        found = find_garbage(opened, older_than=limit)
        if delete:
            found = remove_garbage(opened, found, older_than=limit)
    document: dict[str, Any] = {
        "store": where,
        "older_than_seconds": limit,
        "deleted": delete,
        "garbage": [
            {
                "name": item.entry.name,
                "bytes": item.entry.num_bytes,
                "age_seconds": round(item.entry.age_seconds),
                "reason": item.reason,
            }
            for item in found.garbage
        ],
        "garbage_bytes": found.num_bytes,
        "kept_objects": found.kept_objects,
        "kept_bytes": found.kept_bytes,
        "live_runs": list(found.live_runs),
        "foreign": found.foreign,
        "doubtful": list(found.doubtful),
    }
    if as_json:
        write_document(document)
        return
    console = open_console()
    by_reason: dict[str, list[int]] = {}
    for item in document["garbage"]:
        by_reason.setdefault(item["reason"], []).append(item["bytes"])
    for item in document["garbage"][:SHOWN]:
        console.print(f"{item['name']}  {shown_bytes(item['bytes'])}  {item['reason']}", markup=False, highlight=False)
    if len(document["garbage"]) > SHOWN:
        console.print(f"... and {len(document['garbage']) - SHOWN} more (--json lists all)", markup=False)
    for reason, sizes in by_reason.items():
        console.print(f"{reason}: {len(sizes)} objects, {shown_bytes(sum(sizes))}", markup=False, highlight=False)
    verb = "removed" if delete else "would be removed (--delete does it)"
    total = f"{len(document['garbage'])} objects, {shown_bytes(found.num_bytes)} {verb}"
    console.print(
        f"{total}; {found.kept_objects} objects, {shown_bytes(found.kept_bytes)} are kept, "
        f"{len(found.live_runs)} runs are live, {found.foreign} objects are not lrpq's",
        markup=False,
        highlight=False,
    )
    for key in found.doubtful:
        console.print(f"warning: {key} cannot be read; its stage is left alone", markup=False)


def age_seconds(text: str) -> float:
    """Read ``12h``, ``7d`` or ``4w``.

    Raises:
        ConfigError: written otherwise.
    """
    from lrpq.errors import ConfigError

    match = _AGE.fullmatch(text)
    if match is None:
        raise ConfigError(f"--older-than {text!r}: expected a number and h, d or w, such as 12h or 7d")
    return float(match[1]) * _SECONDS[match[2]]
