"""Compressions that a Prefect server starts: on a schedule, by hand, or through its API.

    lrpq serve --config job.toml --cron "0 3 * * *"
    prefect deploy --all --prefect-file infra/prefect/prefect.yaml

A flow run's one parameter is a configuration, as a file for ``lrpq compress --config`` holds it. The server knows its
schema and refuses what does not fit it; what a schema cannot say (an impossible budget, a text that is missing) ends
the flow run with the line that the command would have shown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from prefect import flow, serve
from prefect.logging import get_run_logger
from prefect.schedules import Cron
from pydantic import WithJsonSchema

from flows.boundary import one_line, refuse_secrets, user_error
from flows.compress import compress_in_flow
from flows.config import CompressConfig
from flows.config_file import load_config
from flows.preflight import preflight
from flows.progress import PlainProgress
from lrpq.errors import ConfigError

MANUAL, SCHEDULED = "by-hand", "scheduled"


def inlined(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON schema without references, so that it can stand inside another."""
    definitions = schema.get("$defs", {})

    def resolved(value: Any) -> Any:
        if isinstance(value, Mapping):
            if "$ref" in value:
                rest = {key: item for key, item in value.items() if key != "$ref"}
                return {**resolved(definitions[str(value["$ref"]).rsplit("/", 1)[1]]), **resolved(rest)}
            return {key: resolved(item) for key, item in value.items() if key != "$defs"}
        return [resolved(item) for item in value] if isinstance(value, list) else value

    found: dict[str, Any] = resolved(schema)
    return found


Configuration = Annotated[dict[str, Any], WithJsonSchema(inlined(CompressConfig.model_json_schema()))]
"""A configuration as JSON; the schema is the configuration's own."""


@flow(name="compress-deployed", retries=0, persist_result=False)
def compress_deployed(configuration: Configuration) -> dict[str, Any]:
    """Compress a model as configured; the result lies in the output folder, its manifest in lrpq.json.

    Raises:
        LrpqError: anything the user can act upon; the flow run's state says what.
    """
    logger = get_run_logger()
    try:
        config = checked_configuration(configuration)
        preflight(config)
    except Exception as error:
        if user_error(error) is not None:
            logger.error("refused: %s", one_line(str(error)))
        raise
    return compress_in_flow(config, PlainProgress(sys.stderr))


def checked_configuration(configuration: Mapping[str, Any]) -> CompressConfig:
    """Check what a deployment is to run with.

    Raises:
        ConfigError: the first mistake, as the command line says it.
    """
    config = load_config(None, configuration)
    refuse_secrets(config.run.calibration.source, config.run.images.source, config.evaluation.source)
    return config


def serve_forever(configurations: Sequence[CompressConfig], *, cron: str | None) -> None:
    """Answer for the deployments until interrupted: one by hand, and with ``cron`` one on a schedule.

    Raises:
        ConfigError: a schedule without a configuration, or one that is no cron line.
    """
    found: list[Any] = [
        compress_deployed.to_deployment(
            name=MANUAL,
            description="Compress a model: give a configuration.",
            tags=["lrpq"],
            enforce_parameter_schema=True,
            parameters=_parameters(configurations[0]) if configurations and cron is None else {},
        )
    ]
    if cron is not None:
        found.append(
            compress_deployed.to_deployment(
                name=SCHEDULED,
                description="Compress the model of the configuration on a schedule; what is stored is not done again.",
                tags=["lrpq"],
                schedule=_schedule(cron),
                parameters=_parameters(configurations[0]),
                enforce_parameter_schema=True,
                concurrency_limit=1,
            )
        )
    serve(*found, pause_on_shutdown=True, print_starting_message=False, limit=1)


def _parameters(config: CompressConfig) -> dict[str, Any]:
    return {"configuration": json.loads(config.model_dump_json())}


def _schedule(cron: str) -> Any:
    try:
        return Cron(cron)
    except ValueError as error:
        raise ConfigError(f"--cron {cron!r}: {one_line(str(error))}; such as '0 3 * * *'") from error
