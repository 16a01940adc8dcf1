"""Rows of a data set of the Hugging Face hub, or of a local folder, streamed through ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, constants

# the base of all transport errors, under the name that does not change with the transport library
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from lrpq.errors import CalibrationError
from tasks.calibration.sources import HubSource

TIMEOUT_SECONDS = 10.0
HUB_ERRORS = (OSError, ValueError, TypeError, KeyError, DatasetsError, HTTPError, pa.ArrowException)


def hub_rows(source: HubSource) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a split; nothing is downloaded beyond what is read.

    Raises:
        CalibrationError: unreachable, unknown, gated or unreadable; without a network within seconds.
    """
    try:
        check_reachable(source)
        split = datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=True)
        rows = iter(split)
        row = next(rows, None)
        while row is not None:
            yield row
            row = next(rows, None)
    except HUB_ERRORS as error:
        raise CalibrationError(hub_message(source, error)) from error


def check_reachable(source: HubSource) -> None:
    """Ask the hub for a data set that is no local folder; raises one of ``HUB_ERRORS``.

    load_dataset alone retries for 23 s before it says that there is no network; this call fails in 0.4 s. Offline mode
    needs no probe: load_dataset then answers at once.
    """
    if not Path(source.dataset).exists() and not constants.HF_HUB_OFFLINE:
        HfApi().dataset_info(source.dataset, timeout=TIMEOUT_SECONDS)


def hub_message(source: HubSource, error: BaseException) -> str:
    """One line on why a data set cannot be read, and what to do."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if Path(source.dataset).exists():
        advice = "check the files of the folder, the config and the split"
    elif constants.HF_HUB_OFFLINE:
        advice = "HF_HUB_OFFLINE is set: unset it, or use text:FILE, a local folder or pydoc:calibrate"
    else:
        advice = "check name, config, split and network, or use text:FILE, a local folder or pydoc:calibrate"
    return f"{source}: cannot be read from the hub ({reason}); {advice}"
