"""What a submitted job runs on the cluster: ``lrpq compress`` with the configuration from its environment."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

from flows.cli import run
from flows.submission import CONFIGURATION


def main() -> None:
    """Run the compression and exit with its code."""
    # Ray ends a job with SIGTERM: taken for Ctrl-C, so that the run is closed and its states tell the truth
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    text = os.environ.get(CONFIGURATION)
    if text is None:
        sys.exit(f"{CONFIGURATION} is not set: this is what lrpq submit starts")
    with tempfile.TemporaryDirectory(prefix="lrpq-job-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(text, encoding="utf-8")
        code = run(["compress", "--config", str(path)])
    sys.exit(code)


if __name__ == "__main__":
    main()
