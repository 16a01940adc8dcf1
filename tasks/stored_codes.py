"""Codes of a plan in the store, whichever stage has made them."""

from __future__ import annotations

from lrpq.model.layers import Choice, LinearSpec
from lrpq.quant.grid import QuantizedWeight
from tasks.artifacts import StageFolder
from tasks.candidates import CandidatesJob, read_candidate
from tasks.refine import read_refined
from tasks.store.objects import ObjectStore

CodesFrom = StageFolder | CandidatesJob
"""A stage with an object a module (refine, stitch, rebuild), or the candidates."""


def read_codes(store: ObjectStore, codes: CodesFrom, spec: LinearSpec, choice: Choice) -> QuantizedWeight:
    """Codes of one module.

    Raises:
        StoreError: they are not there, or damaged.
    """
    if isinstance(codes, CandidatesJob):
        return read_candidate(store, codes, spec, choice)
    return read_refined(store, codes, spec.name, choice)
