"""A compression as a job of a Ray cluster: started, followed, stopped through Ray's Jobs API.

The job is this package's own command on the cluster's head, with the checked configuration in its environment. Nothing
of this machine travels with it but that: the model, the texts and the store must be reachable from the cluster, and
credentials are the cluster's own.
"""

from __future__ import annotations

import json
import time
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flows.boundary import one_line, redacted, refuse_secrets
from flows.config import CompressConfig
from flows.run_config import default_run_id
from lrpq.errors import ConfigError, LrpqError
from tasks.store.documents import canonical_text, plain_json, sha256_text

ENTRYPOINT = "python -m flows.submitted"
CONFIGURATION = "LRPQ_SUBMITTED"
"""Variable of the job's environment: the configuration as JSON."""
DIGEST = "lrpq_configuration"
"""Field of the job's metadata: the same configuration makes the same job."""
POLL_SECONDS = 2.0
STOP_SECONDS = 60
"""Time for an orderly end, after which Ray kills the job."""
AGENT_SECONDS = 90.0
"""Longest wait for a head that has just started."""
FINAL = ("SUCCEEDED", "FAILED", "STOPPED")


class SubmissionError(LrpqError):
    """The cluster's job server refused, or a job failed: what it said."""


class Jobs:
    """Jobs of one cluster.

    Args:
        address: of its dashboard, such as ``http://head:8265``.

    Raises:
        ConfigError: no job server answers there.
    """

    def __init__(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        self.address = redacted(address, {})
        with _reporting(self.address):
            self._client = JobSubmissionClient(address)

    def start(self, config: CompressConfig, *, job_id: str | None = None) -> tuple[str, bool]:
        """Start a compression on the cluster, or find the one with this configuration that is under way.

        Returns:
            The job's id, and whether it was started now.

        Raises:
            ConfigError: the configuration holds a secret, or the cluster refuses it.
        """
        refuse_secrets(config.run.calibration.source, config.run.images.source, config.evaluation.source)
        document = config.model_dump(mode="json")
        document["cluster"]["address"] = "auto"
        digest = sha256_text(canonical_text(plain_json(document)))
        for job in self.list():
            if job["metadata"].get(DIGEST) == digest and job["status"] not in FINAL:
                return str(job["id"]), False
        run_id = config.run_id or default_run_id(config.run)
        wanted = job_id or f"{run_id}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}"
        environment = {CONFIGURATION: json.dumps(document), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
        metadata = {DIGEST: digest, "run_id": run_id, "model": config.run.model}
        with _reporting(self.address):
            return self._submit(wanted, environment, metadata), True

    def _submit(self, job_id: str, environment: dict[str, str], metadata: dict[str, str]) -> str:
        """Submit; a head that has just started has no agent yet and asks to try again."""
        deadline = time.monotonic() + AGENT_SECONDS
        while True:
            try:
                started = self._client.submit_job(
                    entrypoint=ENTRYPOINT,
                    submission_id=job_id,
                    runtime_env={"env_vars": environment},
                    metadata=metadata,
                )
            except RuntimeError as error:
                if "try again" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)
            else:
                return str(started)

    def list(self) -> list[dict[str, Any]]:
        """Compressions that the cluster knows of, oldest first."""
        with _reporting(self.address):
            found = self._client.list_jobs()
        jobs = [_described(job) for job in found if job.submission_id and (job.metadata or {}).get(DIGEST)]
        return sorted(jobs, key=lambda job: job["started"] or 0)

    def status(self, job_id: str) -> dict[str, Any]:
        """One job.

        Raises:
            ConfigError: no such job.
        """
        with _reporting(self.address, job_id):
            return _described(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """All that a job has written so far.

        Raises:
            ConfigError: no such job.
        """
        with _reporting(self.address, job_id):
            return str(self._client.get_job_logs(job_id))

    def stop(self, job_id: str) -> bool:
        """Ask a job to end, as Ctrl-C would; False if it had ended already.

        Raises:
            ConfigError: no such job.
        """
        with _reporting(self.address, job_id):
            return bool(self._client.stop_job(job_id))

    def follow(self, job_id: str, write: Callable[[str], None]) -> dict[str, Any]:
        """Pass on what a job writes until it ends; returns its end. Leaving does not stop the job.

        By asking for its log again and again: a connection held for hours breaks, and what it missed is lost.

        Raises:
            ConfigError: no such job.
        """
        written = 0
        while True:
            found = self.status(job_id)
            text = "" if found["status"] == "PENDING" else self.logs(job_id)
            if len(text) > written:
                write(text[written:])
                written = len(text)
            if found["status"] in FINAL:
                return found
            time.sleep(POLL_SECONDS)


def succeeded(job: Mapping[str, Any]) -> None:
    """Raise unless a job has ended well.

    Raises:
        SubmissionError: it failed or was stopped.
    """
    if job["status"] != "SUCCEEDED":
        said = one_line(str(job["message"] or ""), max_chars=300)
        raise SubmissionError(f"job {job['id']} {str(job['status']).lower()}: {said}; lrpq submit --logs {job['id']}")


def _described(job: Any) -> dict[str, Any]:
    metadata = dict(job.metadata or {})
    return {
        "id": job.submission_id,
        "status": str(getattr(job.status, "value", job.status)),
        "message": job.message,
        "run_id": metadata.get("run_id"),
        "model": metadata.get("model"),
        "started": None if job.start_time is None else job.start_time / 1000,
        "ended": None if not job.end_time else job.end_time / 1000,
        "metadata": metadata,
    }


@contextmanager
def _reporting(address: str, job_id: str | None = None) -> Iterator[None]:
    """Ray's errors as one line: it raises RuntimeError for whatever the server answers."""
    try:
        yield
    except (RuntimeError, ConnectionError, OSError, urllib.error.URLError) as error:
        text = one_line(str(error) or type(error).__name__, max_chars=300)
        if job_id is not None and ("does not exist" in text or "404" in text):
            raise ConfigError(f"job {job_id}: the cluster at {address} knows none; lrpq submit --list") from error
        raise ConfigError(
            f"the job server at {address}: {text}; give the dashboard's address (http://HEAD:8265), and the token if "
            "the cluster asks for one (RAY_AUTH_MODE)"
        ) from error
