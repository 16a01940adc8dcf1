"""Results of calls on workers, without Ray's wrapping of what went wrong."""

from __future__ import annotations

from typing import Any

import ray

from lrpq.errors import ClusterError, LrpqError, WorkerLost

Ref = Any
"""A ray.ObjectRef."""


def value_of(reference: Ref) -> Any:
    """A result that is there.

    Raises:
        LrpqError: as raised on the worker.
        WorkerLost: it died, or what it was given went down with another one.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LrpqError):
            raise error.cause from None
        if isinstance(error.cause, ray.exceptions.RayError):
            raise WorkerLost(_reason(error.cause)) from error
        raise
    except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError) as error:
        raise ClusterError(f"Ray has no room for results between workers: {_reason(error)}") from error
    except ray.exceptions.RayError as error:
        raise WorkerLost(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """The first sentence of Ray's explanation, which goes on with causes and logs."""
    kind = type(error).__name__
    known = {
        "OutOfMemoryError": "Ray ended it because its machine ran out of memory",
        "ActorDiedError": "its process died",
        "ActorUnavailableError": "it cannot be reached",
        "NodeDiedError": "its machine is gone",
    }
    if kind in known:
        return known[kind]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{kind}: {lines[0][:200]}" if lines else kind
