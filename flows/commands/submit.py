"""``lrpq submit``: a compression as a job of a Ray cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.commands import options as o


def submit(
    config: Annotated[
        Path | None, typer.Argument(help="TOML or JSON file of settings, as for compress.", metavar="CONFIG")
    ] = None,
    *,
    address: Annotated[
        str | None,
        typer.Option("--address", help="The cluster's dashboard; $RAY_API_SERVER_ADDRESS if not given.", metavar="URL"),
    ] = None,
    job: Annotated[str | None, typer.Option("--id", help="Name of the new job.", metavar="ID")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the job.")] = False,
    list_jobs: Annotated[bool, typer.Option("--list", help="List the cluster's compressions.")] = False,
    status: Annotated[str | None, typer.Option("--status", help="Show a job.", metavar="ID")] = None,
    logs: Annotated[str | None, typer.Option("--logs", help="Show what a job has written.", metavar="ID")] = None,
    follow: Annotated[str | None, typer.Option("--follow", help="Follow a job to its end.", metavar="ID")] = None,
    stop: Annotated[str | None, typer.Option("--stop", help="Ask a job to end.", metavar="ID")] = None,
    as_json: o.AsJson = False,
) -> None:
    """Run the compression that CONFIG describes as a job of a Ray cluster, and follow it.

    The same CONFIG again follows the job that is under way. Ctrl-C stops following, not the job.
    """
    from flows.config_file import load_config
    from flows.output import stdout_kept_free, write_document
    from lrpq.errors import ConfigError

    chosen = {"CONFIG": config, "--list": list_jobs, "--status": status, "--logs": logs}
    chosen |= {"--follow": follow, "--stop": stop}
    given = [name for name, value in chosen.items() if value]
    if len(given) != 1:
        raise ConfigError(f"give one of {', '.join(chosen)}" + (f", not {' and '.join(given)}" if given else ""))
    where = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not where:
        raise ConfigError("no cluster: give --address http://HEAD:8265")
    asked = None if config is None else load_config(config, {})
    with stdout_kept_free():
        from flows.submission import Jobs, succeeded

        jobs = Jobs(where)
        if asked is not None:
            if "://" not in asked.store:
                typer.echo(f"note: the store {asked.store} is a folder: every node must see the same one", err=True)
            follow, new = jobs.start(asked, job_id=job)
            state = "started" if new else "under way already"
            typer.echo(f"job {follow}: {state}; lrpq submit --follow {follow} --address {jobs.address}", err=True)
        if follow is not None and not detach:
            try:
                found = jobs.follow(follow, lambda text: typer.echo(text, err=True, nl=False))
            except KeyboardInterrupt:
                typer.echo(f"job {follow} goes on; lrpq submit --stop {follow} ends it", err=True)
                raise typer.Exit(130) from None
        elif follow is not None:
            found = jobs.status(follow)
        elif stop is not None:
            stopped = jobs.stop(stop)
            found = {**jobs.status(stop), "stopped_now": stopped}
        elif status is not None:
            found = jobs.status(status)
        elif logs is not None:
            found = {**jobs.status(logs), "logs": jobs.logs(logs)}
        else:
            found = {"jobs": jobs.list()}
    if as_json:
        write_document(found)
    elif logs is not None:
        typer.echo(found["logs"], nl=False)
    else:
        for one in found.get("jobs", [found]):
            typer.echo(f"{one['id']}  {one['status']}  {one['run_id'] or ''}  {one['message'] or ''}")
    if follow is not None and not detach:
        succeeded(found)
