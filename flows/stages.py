"""The stages of a compression, in order: each a loop over blocks of calls to the pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any

from flows.run import Run
from lrpq.errors import QuantizationError, WaypointGone
from lrpq.evaluate.divergence import WindowScore
from lrpq.model.experts import GATE_UP
from lrpq.model.layers import HEAD, LinearSpec
from lrpq.model.streaming import BlockStream
from lrpq.quant.starved import Evidence
from lrpq.refine.routed import POOLED
from lrpq.refine.row_parts import row_parts
from tasks import candidates, evaluate, profile, profile_inputs, profile_sums, refine, stitch
from tasks.artifacts import StageFolder
from tasks.candidates import CandidatesJob
from tasks.cluster import Pool
from tasks.evaluate import EvaluateJob
from tasks.profile_job import STAGE as PROFILE
from tasks.profile_job import ProfileJob
from tasks.refine import RefineJob
from tasks.stitch import StitchJob
from tasks.waypoints import is_waypoint

BLOCKS_IN_FLIGHT = 2
"""Blocks whose sums may wait to be merged and stored: bounds the memory of workers and of the object store."""
MOST_BLOCKS_IN_FLIGHT = 8
IN_FLIGHT_BYTES = 1 << 28
"""Of sums that may wait on a GPU's host however many blocks they are of: small blocks are computed in the time that the
way to the store and back to the driver takes."""
MAX_DAMPED_SHARE = 0.1
"""Share of sites whose Hessian may need more damping than asked for before the stage is a failure."""


MAX_UNWEIGHTED_SHARE = 0.25
"""Share of modules that no gradient may reach before the stage is a failure."""
MAX_STARVED_SHARE = 0.5
"""Share of modules that may be experts with too few tokens before the stage is a failure."""


def _sites(stream: BlockStream, job: CandidatesJob) -> dict[int, dict[str, tuple[LinearSpec, ...]]]:
    """Block -> input site -> its layers; behind the last block the head's, where it is quantized."""
    found = {block: stream.sites(block) for block in range(stream.num_blocks)}
    if job.head is not None and stream.head_spec is not None:
        found[stream.num_blocks] = {HEAD: (stream.head_spec,)}
    return found


def run_profile(run: Run, pool: Pool, job: ProfileJob, stream: BlockStream) -> Mapping[str, Any]:
    """Forward and backward sweep; one task run a block of the backward sweep."""
    label, num_blocks = PROFILE, stream.num_blocks
    done = run.stored(job.folder, label)
    if done is not None:
        return done
    kept: Counter[str] = Counter()
    in_flight = blocks_in_flight(stream, device=run.device)
    run.survive(pool, label, lambda: _profile(run, pool, job, num_blocks, in_flight, kept, label))
    curvature = profile.stored_curvature(job, range(num_blocks + int(job.with_head)))
    if kept["forgotten_bytes"]:
        run.warn(
            f"{label}: no room for {kept['forgotten_bytes']:,} bytes of block inputs, in memory or on disk; they were "
            "computed twice"
        )
    try:
        nats, tokens = profile.losses(job, num_blocks=num_blocks)
    except WaypointGone:  # another driver has completed the stage
        done = run.stored(job.folder, label)
        if done is None:
            raise
        return done
    extra = {"sampled_nll_nats": nats / tokens, "num_tokens": tokens, "curvature": curvature, **kept}
    return run.finish(job.folder, label, extra)


def blocks_in_flight(stream: BlockStream, *, device: str) -> int:
    """Blocks of a profile's way back whose sums may wait."""
    if device == "cpu":
        return BLOCKS_IN_FLIGHT
    largest = max(profile_sums.sums_bytes(stream, block) for block in range(stream.num_blocks))
    return max(BLOCKS_IN_FLIGHT, min(MOST_BLOCKS_IN_FLIGHT, IN_FLIGHT_BYTES // largest))


def _profile(
    run: Run, pool: Pool, job: ProfileJob, num_blocks: int, in_flight: int, kept: Counter[str], label: str
) -> None:
    """The sweeps, from where the store says that they were left."""
    start = profile.position(job, num_blocks=num_blocks)
    left = start.block if start.backward else 2 * num_blocks + 1 - start.block
    with run.timed(label, left):
        pool.each(profile.begin, job, start)
        pending: list[Any] = []  # gradients that are stored beside the first block of the way back
        if not start.backward:
            pending = _profile_forward(run, pool, job, range(start.block, num_blocks), num_blocks, label)
        storing: list[tuple[int, Any]] = []

        def collect(block: int, references: list[Any]) -> None:
            run.step(f"{label} · block {block}", lambda: pool.get(references))
            run.advance(label, f"backward, block {block}")

        for block in range((start.block if start.backward else num_blocks) - 1, -1, -1):
            if block in start.stored:
                done = pool.each_refs(profile.pass_backward, job, block)
            else:
                done = _store_sums(pool, job, block, pool.each_refs(profile.backward, job, block))
            if is_waypoint(block, num_blocks):
                done += _store_gradients(pool, job, block)
            storing.append((block, pending + done))
            pending = []
            if len(storing) >= in_flight:
                collect(*storing.pop(0))
        for item in storing:
            collect(*item)
        for result in pool.each(profile.end):
            kept.update(result)


def _store_sums(pool: Pool, job: ProfileJob, block: int, found: list[Any]) -> list[Any]:
    """Store the sums of a block that the workers have found, each share by its worker, which is sent the others'."""
    done = list(found)
    for share, storer in profile_sums.storing_workers(job, block, len(pool)).items():
        others = [
            pool.submit_passing(i, profile.take, block, share, kept) for i, kept in enumerate(found) if i != storer
        ]
        done.append(pool.submit_beside(storer, profile_sums.store_share, job, block, share, found[storer], *others))
    return done


def _store_gradients(pool: Pool, job: ProfileJob, block: int) -> list[Any]:
    """Store the gradients at the input of a block beside what the workers go on to compute."""
    kept = pool.each_refs(profile.keep_gradients, job, block)
    return [*kept, *(pool.submit_beside(i, profile.store_gradients, job, block, k) for i, k in enumerate(kept))]


def _profile_forward(run: Run, pool: Pool, job: ProfileJob, blocks: range, num_blocks: int, label: str) -> list[Any]:
    """The forward sweep and the labels; returns references to gradients that are being stored."""
    waiting: list[tuple[int, list[Any]]] = []
    in_flight = len(blocks) + 1 if job.weighs_tokens else BLOCKS_IN_FLIGHT

    def wait(block: int, references: list[Any]) -> None:
        run.step(f"{label} · forward · block {block}", lambda: pool.get(references))
        run.advance(label, f"forward, block {block}")

    for block in blocks:
        if job.weighs_tokens:
            waiting.append((block, pool.each_refs(profile.forward, job, block)))
        else:
            while waiting and is_waypoint(block, num_blocks):  # behind a waypoint, sums of earlier blocks are stored
                wait(*waiting.pop(0))
            parts = pool.each_refs(profile_inputs.forward, job, block)
            stored = pool.submit_beside(block % len(pool), profile_inputs.store_inputs, job, block, *parts)
            waiting.append((block, [stored]))
        if len(waiting) >= in_flight:
            wait(*waiting.pop(0))
    for item in waiting:
        wait(*item)
    run.step(f"{label} · labels", lambda: pool.each(profile.seed_gradients, job))
    if job.with_head:
        sums = pool.each_refs(profile.take_head)
        store = partial(pool.submit, 0, profile_sums.store_head, job, num_blocks, *sums)
        run.step(f"{label} · head", lambda: pool.get([store()]))
    storing = _store_gradients(pool, job, num_blocks)
    run.advance(label, "labels")
    return storing


def run_candidates(run: Run, pool: Pool, job: CandidatesJob, stream: BlockStream) -> list[dict[str, Any]]:
    """What every module would cost at every choice; returns the cost rows."""
    label = candidates.STAGE
    specs = _sites(stream, job)
    sites = {block: list(found) for block, found in specs.items()}
    if run.stored(job.folder, label) is None:
        missing = list(candidates.missing_parts(job, specs))
        items = [(b, s, (job, b, s, part, specs[b][s])) for b, s, part in missing]
        _each_site(run, pool, candidates.quantize_site, specs, items, label=label)
        rows = candidates.read_costs(job, sites)
        run.finish(job.folder, label, count_degradations(rows))
        return rows
    return candidates.read_costs(job, sites)


def run_stitch(run: Run, pool: Pool, job: StitchJob, stream: BlockStream, *, label: str) -> None:
    """Codes of a plan, all layers on the original inputs. Modules already in the store are not redone."""
    if run.stored(job.folder, label) is not None:
        return
    specs = {block: stream.sites(block) for block in range(stream.num_blocks)}
    items = [(b, s, (job, b, s, specs[b][s])) for b, s in stitch.missing_sites(job, specs)]
    _each_site(run, pool, stitch.quantize_site, specs, items, label=label)
    run.finish(job.folder, label, {})


@contextmanager
def telling_of_losses(run: Run, pool: Pool, label: str) -> Iterator[None]:
    """Warn of every worker that is lost inside; others did its part."""
    losses = len(pool.losses)
    yield
    for loss in pool.losses[losses:]:
        run.warn(f"{label}: a worker was lost ({loss}); others did its part")


def each_call(
    run: Run, pool: Pool, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *, label: str, unit: str
) -> None:
    """Call a worker's function with each of some arguments; one task run, and one step of the progress, a call."""
    with telling_of_losses(run, pool, label), run.timed(label, len(calls), unit):
        ends = pool.map(function, calls)
        for _ in calls:
            run.step(label, lambda: next(ends))
            run.advance(label)


def _each_site(
    run: Run,
    pool: Pool,
    function: Callable[..., Any],
    specs: Mapping[int, Mapping[str, tuple[LinearSpec, ...]]],
    missing: Sequence[tuple[int, str, tuple[Any, ...]]],
    *,
    label: str,
) -> None:
    """Call a worker's function on every missing site or part of one (block, site, arguments); one task run a block."""
    with telling_of_losses(run, pool, label), run.timed(label, len(missing), "site"):
        ends = pool.map(function, [arguments for _, _, arguments in missing], overlap=True)
        left = {block: sum(b == block for b, _, _ in missing) for block in specs}

        def wait_for(block: int) -> None:
            while left[block]:
                position, _ = next(ends)
                ended, site, _ = missing[position]
                left[ended] -= 1
                run.advance(label, f"block {ended}, {site}")

        for block, sites in specs.items():
            place = "head" if HEAD in sites else f"block {block}"
            run.step(f"{label} · {place}", partial(wait_for, block))


def count_degradations(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count modules whose damping had to be raised, inputs that never fire and experts with too few tokens.

    Raises:
        QuantizationError: too many Hessians were not positive definite, or too many experts have too few tokens.
    """
    by_module = {row["name"]: row for row in rows}
    damped = [name for name, row in by_module.items() if row["damping_steps"]]
    if len(damped) > MAX_DAMPED_SHARE * len(by_module):
        raise QuantizationError(
            f"{len(damped)} of {len(by_module)} modules have Hessians that are not positive definite (first: "
            f"{damped[0]}); calibrate on more tokens or raise --damping"
        )
    evidence = Counter(row["evidence"] for row in by_module.values())
    unweighted = evidence[Evidence.UNWEIGHTED.value]
    if unweighted > MAX_UNWEIGHTED_SHARE * len(by_module):
        raise QuantizationError(
            f"no gradient reaches {unweighted} of {len(by_module)} modules; look for layers of zeros in the model"
        )
    starved = evidence[Evidence.POOLED.value] + evidence[Evidence.NONE.value]
    _check_starved(starved, len(by_module))
    return {
        "not_positive_definite": len(damped),
        "dead_inputs": sum(row["dead_inputs"] for row in by_module.values()),
        "experts_pooled": evidence[Evidence.POOLED.value],
        "experts_without_tokens": evidence[Evidence.NONE.value],
        "without_relevance": evidence[Evidence.UNWEIGHTED.value],
    }


def _check_starved(starved: int, num_modules: int) -> None:
    if starved > MAX_STARVED_SHARE * num_modules:
        raise QuantizationError(
            f"{starved} of {num_modules} modules are experts that too few calibration tokens were sent to; "
            "calibrate on more tokens (--calibration-windows, --length)"
        )


def run_refine(run: Run, pool: Pool, job: RefineJob, stream: BlockStream, *, label: str) -> Mapping[str, Any]:
    """Walk the blocks, quantizing each behind the quantized prefix. Modules already in the store are not redone."""
    done = run.stored(job.folder, label)
    if done is not None:
        return done
    run.survive(pool, label, lambda: _refine(run, pool, job, stream, label))
    counts = refine.read_counts(run.store, job.folder, [spec for spec in stream.specs if job.choices[spec.name]])
    num_modules = sum(choice is not None for choice in job.choices.values())
    if counts["damping_steps"] > MAX_DAMPED_SHARE * num_modules:
        raise QuantizationError(
            f"{label}: the damping was raised {counts['damping_steps']} times in {num_modules} modules, because their "
            "Hessians are not positive definite; calibrate on more tokens or raise the damping"
        )
    _check_starved(counts["experts_pooled"] + counts["experts_without_tokens"], num_modules)
    return run.finish(job.folder, label, counts)


def _refine(run: Run, pool: Pool, job: RefineJob, stream: BlockStream, label: str) -> None:
    """The walk, from where the store says that it was left."""
    first = refine.first_block(job, [stream.block_specs(block) for block in range(stream.num_blocks)])
    with run.timed(label, stream.num_blocks - first):
        if first == stream.num_blocks:
            return
        pool.each(refine.begin, job, first)
        storing: list[Any] = []
        entering = pool.each_refs(refine.enter, job, first)
        for block in range(first, stream.num_blocks):
            action = partial(_refine_block, run, pool, job, stream, block, entering)
            stored, entering = run.step(f"{label} · block {block}", action)
            pool.get(storing)  # of the block before: so much may wait in memory
            storing = stored
            run.advance(label, f"block {block}")
        pool.get(storing)
        pool.each(refine.end)


def _refine_block(
    run: Run, pool: Pool, job: RefineJob, stream: BlockStream, block: int, entering: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Quantize a block, whose weights the workers are reading, and move the streams behind it; returns references to
    what is being stored, and to the reading of the next block's weights, which waits for nobody."""
    pool.get(entering)  # a block that cannot be read is an error here, not a later one
    quantized: list[Any] = []
    pooled: list[Any] = []
    summed: list[Any] = []
    storing: list[Any] = []
    for layers in stream.steps(block):
        members = [spec for spec in layers if job.choices[spec.name] is not None]
        missing = {spec.name for spec in members if not run.store.exists(job.folder.module(spec.name))}
        if missing:
            summed += pool.each_refs(refine.products, block, layers, *quantized)
        if missing and layers[0].routed and layers[0].kind == GATE_UP and not pooled:
            pooled = pool.each_refs(refine.take, POOLED)
        new: list[Any] = []
        places = _places([spec for spec in members if spec.name in missing], len(pool))
        for site, readers in groupby(layers, key=lambda spec: spec.input_site):
            stored = [spec for spec in readers if job.choices[spec.name] is not None and spec.name not in missing]
            new += [pool.submit(index % len(pool), refine.load_refined, job, spec) for index, spec in enumerate(stored)]
            of_site = [place for place in places if place.spec.input_site == site]
            made = _quantize_site(pool, job, site, of_site, pooled) if missing else {}
            for name, parts in made.items():
                storer = next(place.worker for place in of_site if place.spec.name == name)
                storing.append(pool.submit_beside(storer, refine.store_module, job, *parts))
                new += parts
        quantized += new
    advanced = pool.each_refs(refine.advance, block, *quantized)
    if is_waypoint(block + 1, stream.num_blocks):
        advanced += pool.each_refs(refine.keep, job, block + 1)
    following = pool.each_refs(refine.enter, job, block + 1) if block + 1 < stream.num_blocks else []
    pool.get(summed)  # what went wrong there is the cause of what goes wrong later
    pool.get(advanced)
    return storing, following


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Who quantizes a layer, or some parts of its rows."""

    spec: LinearSpec
    cuts: tuple[slice, ...]
    worker: int


def _places(specs: Sequence[LinearSpec], num_workers: int) -> list[_Place]:
    """Share the layers of a step out: whole ones, or the parts of large ones where the workers then have less unequal
    numbers of weights. Parts are what they are whoever quantizes them (lrpq.refine.row_parts)."""
    found: list[list[_Place]] = []
    heaviest: list[int] = []
    for whole in (True, False):
        loads = [0] * num_workers
        places: list[_Place] = []
        for spec in specs:
            parts = row_parts(spec.d_out, spec.d_in)
            by_worker: dict[int, list[slice]] = {}
            for cuts in [parts] if whole or spec.routed else [(part,) for part in parts]:
                worker = loads.index(min(loads))  # k and v are often narrow: together no more than q
                loads[worker] += (cuts[-1].stop - cuts[0].start) * spec.d_in
                by_worker.setdefault(worker, []).extend(cuts)
            places += [_Place(spec=spec, cuts=tuple(cuts), worker=worker) for worker, cuts in by_worker.items()]
        found.append(places)
        heaviest.append(max(loads))
    return found[heaviest.index(min(heaviest))]


def _quantize_site(
    pool: Pool, job: RefineJob, site: str, places: Sequence[_Place], pooled: Sequence[Any]
) -> dict[str, list[Any]]:
    """Quantize layers of one site, each on its worker: it takes its own sums as they are, the others' through Ray,
    which are sent only where somebody else needs them. Returns references to the parts of each module."""
    workers = {place.worker for place in places}
    sums = {
        index: pool.submit(index, refine.take, site, index in workers)
        for index in range(len(pool))
        if index not in workers or len(workers) > 1  # of the one that quantizes nobody else needs them
    }
    left = Counter(place.worker for place in places)
    found: dict[str, list[Any]] = {}
    for place in places:
        spec, worker = place.spec, place.worker
        left[worker] -= 1
        others = [part for index, part in sums.items() if index != worker]
        experts = pooled if spec.routed and spec.kind == GATE_UP else []
        made = pool.submit(
            worker, refine.quantize, job, spec, place.cuts, len(others), left[worker] > 0, *others, *experts
        )
        found.setdefault(spec.name, []).append(made)
    return found


def run_evaluate(run: Run, pool: Pool, job: EvaluateJob, folder: StageFolder) -> Mapping[str, Any]:
    """Perplexity and KL divergence of all variants on the same windows."""
    label = evaluate.STAGE
    done = run.stored(folder, label)
    if done is not None:
        return done
    scores = run_scores(run, pool, job, label)
    summaries = {name: asdict(evaluate.summarize(rows)) for name, rows in scores.items()}
    extra = {"summary": summaries, "windows": {n: [asdict(r) for r in rows] for n, rows in scores.items()}}
    return run.finish(folder, label, extra)


def run_scores(run: Run, pool: Pool, job: EvaluateJob, label: str) -> dict[str, list[WindowScore]]:
    """Scores of all variants on all windows, in one pass over the blocks."""

    def attempt() -> dict[str, list[WindowScore]]:
        with run.timed(label, 1, "pass"):
            parts = run.step(label, lambda: pool.each(evaluate.score, job))
            run.advance(label)
        return evaluate.merged_scores(parts)

    return run.survive(pool, label, attempt)
