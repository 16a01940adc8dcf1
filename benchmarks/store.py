"""A Hessian of 1 GB through the store and through plain pyarrow, against the same S3 server, in turns.

    python -m benchmarks.store --width 22528 --rounds 3 --json store.json

Plain pyarrow writes the same tiles with ``pyarrow.parquet`` to ``pyarrow.fs.S3FileSystem`` in row groups of the same
size and with the same encoding, without our checksums, and reads them back row group by row group into a matrix;
"pyarrow, defaults" is the same with pyarrow's own encoding and compression. The server is SeaweedFS on this machine
(``--endpoint`` takes another one; credentials from the environment), so that client and server share its cores. Every
measurement runs in a process of its own; peak memory is that process's, above the matrix and above one that only
imports and makes the matrix.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BUCKET = "lrpq-chaos"
METHODS = ("lrpq", "pyarrow", "pyarrow-defaults")
NOTHING = "nothing"


def matrix_of(width: int) -> Any:
    """A symmetric matrix like a Hessian's: no two values alike, a wide range."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(64, width)
    x *= torch.logspace(-2, 2, width)
    H = torch.zeros(width, width)
    for start in range(0, width, 2048):  # without a second matrix
        H[start : start + 2048] = x[:, start : start + 2048].T @ x
    return H


def tile_groups(H: Any) -> Any:
    """Tables of at most 60 tiles, as the store makes them, without checksums."""
    import numpy as np
    import pyarrow as pa

    from tasks.store.symmetric import TILES_PER_GROUP
    from tasks.store.tiles import TILE

    count = -(-len(H) // TILE)
    places = [(row, column) for row in range(count) for column in range(row, count)]
    for start in range(0, len(places), TILES_PER_GROUP):
        group = places[start : start + TILES_PER_GROUP]
        values = np.zeros((len(group), TILE, TILE), dtype=np.float32)
        for place, (row, column) in zip(values, group, strict=True):
            block = H[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE].numpy()
            place[: block.shape[0], : block.shape[1]] = block
        yield pa.table(
            {
                "tile_row": pa.array([row for row, _ in group], pa.int32()),
                "tile_column": pa.array([column for _, column in group], pa.int32()),
                "values": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), TILE * TILE),
            }
        )


def plain_file_system() -> Any:
    from pyarrow import fs

    return fs.S3FileSystem(
        endpoint_override=os.environ["AWS_ENDPOINT_URL"].split("://")[1],
        scheme=os.environ["AWS_ENDPOINT_URL"].split("://")[0],
        region="us-east-1",
    )


def write(method: str, H: Any, key: str) -> None:
    if method == "lrpq":
        from tasks.store.objects import open_store
        from tasks.store.symmetric import write_symmetric

        write_symmetric(open_store(f"s3://{BUCKET}/lrpq"), key, {"x": H})
        return
    import pyarrow.parquet as pq

    options: dict[str, Any] = {}
    if method == "pyarrow":
        options = {
            "compression": "zstd",
            "use_dictionary": False,
            "column_encoding": {"values.list.element": "BYTE_STREAM_SPLIT"},
            "write_statistics": False,
        }
    writer: pq.ParquetWriter | None = None
    with plain_file_system().open_output_stream(f"{BUCKET}/{key}") as file:
        for table in tile_groups(H):
            if writer is None:
                writer = pq.ParquetWriter(file, table.schema, **options)
            writer.write_table(table)
        assert writer is not None
        writer.close()


def read(method: str, width: int, key: str) -> Any:
    import torch

    if method == "lrpq":
        from tasks.store.objects import open_store
        from tasks.store.symmetric import read_symmetric

        return read_symmetric(open_store(f"s3://{BUCKET}/lrpq"), key, "x")[0]
    import pyarrow.parquet as pq

    from tasks.store.tiles import TILE

    H = torch.zeros(width, width)
    target = H.numpy()
    with plain_file_system().open_input_file(f"{BUCKET}/{key}") as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.metadata.num_row_groups):
            table = parquet.read_row_group(group)
            rows, columns = table.column("tile_row").to_pylist(), table.column("tile_column").to_pylist()
            tiles = table.column("values").combine_chunks().flatten().to_numpy().reshape(-1, TILE, TILE)
            for row, column, tile in zip(rows, columns, tiles, strict=True):
                above = target[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
                part = tile[: above.shape[0], : above.shape[1]]
                above[:] = part
                target[column * TILE : (column + 1) * TILE, row * TILE : (row + 1) * TILE] = part.T
    return H


def child(action: str, method: str, width: int, key: str) -> None:
    """One measurement; prints seconds and peak memory."""
    import torch

    import tasks.store.symmetric  # noqa: F401 -- so that imports are in the baseline of all

    torch.set_num_threads(1)
    H = matrix_of(width) if action == "write" else None
    if method == NOTHING and H is None:
        H = torch.ones(width, width)
    started = time.monotonic()
    if method != NOTHING:
        if action == "write":
            write(method, H, key)
        else:
            H = read(method, width, key)
    seconds = time.monotonic() - started
    assert H is not None
    total = float(H.diagonal().double().sum())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "trace": total}))


def measure(action: str, method: str, width: int, key: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.store", "--child", action, method, "--width", str(width), "--key", key]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def start_server(folder: Path) -> Any:
    from tests.chaos.services import KEY, SECRET, S3Server

    os.environ.update(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_EC2_METADATA_DISABLED="true")
    server = S3Server(folder)
    os.environ["AWS_ENDPOINT_URL"] = server.url
    server.start()
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=22_528, help="of the matrix; 22,528 is 1.01 GB as a triangle")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--endpoint", help="an S3 server that has the bucket lrpq-chaos; SeaweedFS is started if absent"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--key", default="h.parquet", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(*asked.child, asked.width, asked.key)
        return
    folder = Path(tempfile.mkdtemp(prefix="lrpq-bench-"))
    server = None
    if asked.endpoint is None:
        server = start_server(folder)
    else:
        os.environ["AWS_ENDPOINT_URL"] = asked.endpoint
    try:
        report(asked.width, asked.rounds, asked.json)
    finally:
        if server is not None:
            server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def report(width: int, rounds: int, output: Path | None) -> None:
    megabytes = width * (width + 1) / 2 * 4 / 1e6
    bases = {action: measure(action, NOTHING, width, "-")["peak_bytes"] for action in ("write", "read")}
    rows: dict[str, dict[str, list[dict[str, float]]]] = {m: {"write": [], "read": []} for m in METHODS}
    for number in range(rounds):
        for method in METHODS[number % 3 :] + METHODS[: number % 3]:
            key = f"{method}-{number}.parquet"
            for action in ("write", "read"):
                rows[method][action].append(measure(action, method, width, key))
    traces = {round(row["trace"] / 1e3, 3) for found in rows.values() for both in found.values() for row in both}
    assert len(traces) == 1, f"what was read is not what was written: {traces}"
    print(f"{megabytes:.0f} MB of triangle, width {width}, {rounds} rounds, medians; MB/s of the triangle\n")
    print("| method | write MB/s | read MB/s | peak MB above the matrix, write | read |\n|---|---|---|---|---|")
    summary: dict[str, dict[str, float]] = {}
    for method in METHODS:
        found = {
            action: statistics.median(row["seconds"] for row in rows[method][action]) for action in ("write", "read")
        }
        above = {
            action: max(row["peak_bytes"] for row in rows[method][action]) - bases[action]
            for action in ("write", "read")
        }
        summary[method] = {
            "write_mb_s": megabytes / found["write"],
            "read_mb_s": megabytes / found["read"],
            "write_above_mb": above["write"] / 1e6,
            "read_above_mb": above["read"] / 1e6,
        }
        print("| " + method + " | " + " | ".join(f"{value:.0f}" for value in summary[method].values()) + " |")
    for other in METHODS[1:]:
        shares = [summary["lrpq"][name] / summary[other][name] for name in ("write_mb_s", "read_mb_s")]
        print(f"\nlrpq / {other}: write {shares[0]:.0%}, read {shares[1]:.0%}")
    if output is not None:
        output.write_text(json.dumps({"megabytes": megabytes, "summary": summary, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
