"""``lrpq serve``: deployments on a Prefect server, and a process that runs what it starts."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.boundary import resumable
from flows.commands import options as o


def serve(
    *,
    config: o.ConfigFile = None,
    cron: Annotated[
        str | None, typer.Option("--cron", help="Run the configuration on this schedule.", metavar="'0 3 * * *'")
    ] = None,
) -> None:
    """Offer compressions on the Prefect server of PREFECT_API_URL and run what it starts, until Ctrl-C.

    The deployment compress-deployed/by-hand takes a configuration; --config with --cron adds one on a schedule.
    Parameters are checked by the server before a run is made. Without PREFECT_API_URL a server is started here.
    """
    from flows.config_file import load_config
    from flows.prefect_server import prefect_api
    from lrpq.errors import ConfigError

    if cron is not None and config is None:
        raise ConfigError("--cron needs a configuration to run with: give --config FILE")
    asked = [] if config is None else [load_config(config, {})]
    with resumable(), prefect_api(deployments=True) as url:
        from flows.deployments import serve_forever

        typer.echo(f"serving compress-deployed on {url}; Ctrl-C ends it", err=True)
        serve_forever(asked, cron=cron)
