"""Stores are tested when they are opened; a process opens each of them once."""

from __future__ import annotations

from functools import cache

from tasks.store import objects
from tasks.store.objects import ObjectStore


@cache
def open_store(url: str) -> ObjectStore:
    """The store at ``url``, opened (and tested) once a process."""
    return objects.open_store(url)
