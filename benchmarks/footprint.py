"""Wall time and peak memory of a command with all the processes it starts.

    python -m benchmarks.footprint [--json FILE] -- COMMAND ...

Memory is sampled twice a second over the whole process tree: the sum of proportional set sizes (PSS: a page that n
processes share counts 1/n in each), and the sum of resident set sizes beside it, in which shared pages count n times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.5


def tree_bytes(root: psutil.Process) -> tuple[int, int]:
    """Sums of PSS and RSS over a process and all below it; those that end meanwhile are left out."""
    pss = rss = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            memory = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        pss += memory.pss
        rss += memory.rss
    return pss, rss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    started = time.monotonic()
    running = subprocess.Popen(arguments.command)
    root, peak_pss, peak_rss = psutil.Process(running.pid), 0, 0
    while running.poll() is None:
        try:
            pss, rss = tree_bytes(root)
        except psutil.NoSuchProcess:
            break
        peak_pss, peak_rss = max(peak_pss, pss), max(peak_rss, rss)
        time.sleep(SAMPLE_SECONDS)
    row = {
        "exit_code": running.wait(),
        "seconds": round(time.monotonic() - started, 1),
        "peak_pss_mb": round(peak_pss / 1e6),
        "peak_rss_sum_mb": round(peak_rss / 1e6),
    }
    print(json.dumps(row))
    if arguments.json:
        arguments.json.write_text(json.dumps(row) + "\n", encoding="utf-8")
    raise SystemExit(row["exit_code"])


if __name__ == "__main__":
    main()
