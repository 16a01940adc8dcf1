"""What a submitted job runs on the cluster: ``lrpq compress`` with a configuration from its environment or a file.

    python -m flows.submitted [--config FILE]

It first asks the autoscaler for as many workers as the configuration names and waits for them: workers are laid out by
what the cluster has when the run begins.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.cli import run
from flows.config import CompressConfig
from flows.config_file import load_config
from flows.submission import CONFIGURATION
from lrpq.errors import ConfigError, LrpqError

SCALE_SECONDS = 1800.0
"""Longest wait for nodes: a cloud takes minutes."""
POLL_SECONDS = 5.0


def main() -> None:
    """Run the compression and exit with its code."""
    # Ray ends a job with SIGTERM: taken for Ctrl-C, so that the run is closed and its states tell the truth
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    with tempfile.TemporaryDirectory(prefix="lrpq-job-") as folder:
        path = _configuration(Path(folder))
        try:
            config = load_config(path, {})
            with reserved(config):
                code = run(["compress", "--config", str(path)])
        except LrpqError as error:
            sys.exit(f"error: {error}")
    sys.exit(code)


@contextmanager
def reserved(config: CompressConfig, *, wait_seconds: float = SCALE_SECONDS) -> Iterator[None]:
    """Inside, the cluster has the workers' resources; afterwards the autoscaler may take them away.

    Raises:
        ConfigError: the cluster does not grow so far.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    wanted, threads = config.cluster.workers, float(config.run.threads)
    if wanted is None or config.cluster.address is None:
        yield
        return
    needs = {"CPU": threads, "GPU": 1.0} if config.cluster.device == "cuda" else {"CPU": threads}

    def ask(bundles: int) -> None:
        request_resources(bundles=[dict(needs)] * bundles)

    ray.init(address=config.cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        ask(wanted)
        deadline = time.monotonic() + wait_seconds
        while True:
            found = ray.cluster_resources()
            if all(found.get(name, 0.0) >= amount * wanted for name, amount in needs.items()):
                break
            if time.monotonic() > deadline:
                has = ", ".join(f"{found.get(name, 0.0):g} {name}" for name in needs)
                raise ConfigError(
                    f"{wanted} workers of {threads:g} cores: after {wait_seconds:.0f} s the cluster has {has}; raise "
                    "maxReplicas of its worker group, or ask for fewer --workers"
                )
            time.sleep(POLL_SECONDS)
        ray.shutdown()
        yield
    finally:
        if not ray.is_initialized():
            ray.init(address=config.cluster.address, log_to_driver=False, logging_level="ERROR")
        ask(0)
        ray.shutdown()


def _configuration(folder: Path) -> Path:
    if len(sys.argv) == 3 and sys.argv[1] == "--config":
        return Path(sys.argv[2])
    text = os.environ.get(CONFIGURATION)
    if text is None:
        sys.exit(f"{CONFIGURATION} is not set: this is what lrpq submit starts")
    path = folder / "job.json"
    path.write_text(text, encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
