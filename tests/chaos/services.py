"""What a run needs, each in processes that can be killed and started again: SeaweedFS, Prefect, nodes of Ray."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.config
import botocore.exceptions
import botocore.session
import psutil

BUCKET = "lrpq-chaos"
KEY, SECRET = "chaos-key-5c1d", "chaos-secret-do-not-print-8be2f4"
START_SECONDS = 180.0
_WEED_PORTS = [f"-{part}.port{kind}" for part in ("master", "volume", "filer", "s3", "admin") for kind in ("", ".grpc")]


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on; below 50,000, since parts of SeaweedFS also want the port 10,000 above their own.

    Processes that look at the same time start far apart, also where one was started right after the other: a port is
    free until the server that it is for has started.
    """
    found: list[int] = []
    candidate = 20_000 + os.getpid() * 97 % 18_000
    while len(found) < count:
        candidate += 1
        with socket.socket() as one, socket.socket() as above:
            try:
                one.bind(("127.0.0.1", candidate))
                above.bind(("127.0.0.1", candidate + 10_000))
            except OSError:
                continue
        found.append(candidate)
    return found


def wait_for(ready: Callable[[], bool], what: str) -> None:
    """Until it is."""
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not start within {START_SECONDS:.0f} s")
        time.sleep(0.1)


class Service(ABC):
    """A process with a log; ``kill`` is -9."""

    name = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]: ...

    def environment(self) -> dict[str, str]:
        return {}

    @abstractmethod
    def is_ready(self) -> bool: ...

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env={**os.environ, **self.environment()},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for(self.is_ready, self.name)

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class S3Server(Service):
    """SeaweedFS, everything in one process."""

    name = "seaweedfs"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ports = free_ports(len(_WEED_PORTS))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[_WEED_PORTS.index('-s3.port')]}"

    def command(self) -> list[str]:
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        assert weed is not None, "no SeaweedFS: install lrpq[test]"
        return [
            *(weed, "mini", f"-dir={self.folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}"),
            *("-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"{name}={port}" for name, port in zip(_WEED_PORTS, self.ports, strict=True)),
        ]

    def environment(self) -> dict[str, str]:
        (self.folder / "data").mkdir(exist_ok=True)
        return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "GOMEMLIMIT": "400MiB"}

    def is_ready(self) -> bool:
        """Whether the bucket is there: the port answers, and refuses strangers, before it has been made."""
        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=botocore.config.Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
        )
        try:
            client.head_bucket(Bucket=BUCKET)
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
            return False
        return True


class PrefectServer(Service):
    """``prefect server start`` with a database of its own."""

    name = "prefect"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = free_ports(20)[-1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def command(self) -> list[str]:
        start = ["server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        return [sys.executable, "-m", "prefect", *start]

    def environment(self) -> dict[str, str]:
        return {
            "PREFECT_HOME": str(self.folder / "home"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


class Cluster:
    """Ray's head without cores, where drivers connect, and nodes with some."""

    def __init__(self, cpus: list[int]) -> None:
        from ray.cluster_utils import Cluster as Processes

        common = {"object_store_memory": 128 << 20, "include_dashboard": False}
        self._common = common
        self._cluster = Processes(initialize_head=True, head_node_args={"num_cpus": 0, **common})
        self.nodes = [self.add(number) for number in cpus]
        self._cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        address: str = self._cluster.address
        return address

    def add(self, cpus: int) -> Any:
        return self._cluster.add_node(num_cpus=cpus, **self._common)

    def kill(self, node: Any) -> None:
        """The raylet and every process of its, as when the machine loses power."""
        processes = [info.process for kind, infos in node.all_processes.items() for info in infos]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                found = psutil.Process(process.pid)
                family = [found, *found.children(recursive=True)]
                for member in family:
                    member.kill()
        self.nodes.remove(node)

    def tidy(self, node: Any) -> None:
        """Have Ray's own record of a node that was killed go too."""
        with contextlib.suppress(Exception):  # its processes are gone already
            self._cluster.remove_node(node, allow_graceful=False)

    def workers(self) -> list[psutil.Process]:
        """Processes of lrpq's workers, on all nodes."""
        found = []
        for node in self.nodes:
            for info in node.all_processes.get("raylet", []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(info.process.pid).children(recursive=True):
                        if child.name().startswith("ray::Worker") or "ray::Worker" in " ".join(child.cmdline()):
                            found.append(child)
        return found

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextlib.contextmanager
def running(folder: Path, *, cpus: list[int]) -> Iterator[tuple[S3Server, PrefectServer, Cluster]]:
    """All of them, and the environment that drivers and nodes find them with."""
    s3, prefect = S3Server(folder / "s3"), PrefectServer(folder / "prefect")
    values = {
        "AWS_ENDPOINT_URL": s3.url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        "PREFECT_API_URL": prefect.url,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TMPDIR": str(folder / "r"),  # its own record of the running cluster, which others would join
        "OMP_NUM_THREADS": "1",
    }
    (folder / "r").mkdir(parents=True, exist_ok=True)
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    cluster: Cluster | None = None
    try:
        s3.start()
        prefect.start()
        cluster = Cluster(cpus)
        yield s3, prefect, cluster
    finally:
        if cluster is not None:
            cluster.shutdown()
        prefect.kill()
        s3.kill()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
