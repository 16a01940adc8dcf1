"""One compression of an image classifier: the stages of a language model's, and the grids of activations before them.

Images take the place of windows of text. Where activations are to be quantized, their grids come first, behind the
profile, which says what their errors cost. What they fold into the model makes another one, which all further stages
see: its weights are quantized and written, and are rounded behind activations on the grids. Its profile is that of the
original, with Hessians carried over as they are read: gradients are walked back once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from flows import guard, jobs, reconstruction
from flows.compression import Compression, Prepared, Rebuilding
from flows.guard import Contender, Windows
from flows.heat_maps import HeatReport, run_heat_maps
from flows.image_shares import none_held_out
from flows.images import MeasuredImages, calibration_images, evaluation_images
from flows.output_checkpoint import Call
from flows.planning import Planner, Plans
from flows.reconstruction import AS_ROUNDED, CHECK, REBUILT, run_rebuild, stream_of
from flows.result import choices_json, model_bytes
from flows.sharing import Shared, check_share, run_responses, share
from flows.stages import each_call, run_candidates, run_refine
from flows.stitching import Stitching
from lrpq.activations.allocate import allocate_widths
from lrpq.activations.calibrate import Calibration
from lrpq.allocate.budget import UNQUANTIZED_BITS
from lrpq.allocate.plan import Plan
from lrpq.allocate.problem import CostRow
from lrpq.checkpoint.activations import TABLE
from lrpq.checkpoint.plan import planned_size
from lrpq.errors import ModelError
from lrpq.model.inputs import image_shape
from lrpq.model.layers import Choice
from lrpq.model.streaming import BlockStream
from lrpq.relevance.patches import special_tokens
from lrpq.tune.options import Reconstruction
from lrpq.tune.reconstruct import divided
from tasks import activations, assemble_classifier, image_scores
from tasks.artifacts import StageFolder
from tasks.assemble_classifier import AssembleClassifierJob, checkpoint_activations
from tasks.candidates import CandidatesJob
from tasks.chosen_grids import ChosenGrids, chosen_grids, fold
from tasks.cluster import Pool
from tasks.evaluate import STAGE as EVALUATE
from tasks.image_scores import ClassifierCheckpoint, ClassifierVariant, ScoreImagesJob, StoredClassifierCodes
from tasks.profile_job import ProfileJob
from tasks.rebuild import RebuildJob
from tasks.stored_codes import CodesFrom
from tasks.streams import DTYPES, StreamJob


class ImageCompression(Compression):
    """One compression; what differs from that of a language model."""

    WRITER = "tasks.assemble_classifier"
    WINDOWS = Windows.IMAGES

    def window_length(self) -> int:
        """Tokens of an image at the first block."""
        return int(self.stream.embed(torch.zeros(1, *image_shape(self.source.config))).shape[1])

    def resolved_dtype(self) -> str:
        """Float32 where activations are folded: bfloat16 would round what is folded again."""
        return "float32" if self.config.run.images.activations else super().resolved_dtype()

    def _prepare(self, pool: Pool) -> Prepared:
        run, config = self.run_state, self.config
        self.context = replace(self.context, images=True)
        about: dict[str, Any] = {
            "model": self.model,
            "model_config": self.source.config,
            "fingerprint": self.fingerprint,
        }
        self.windows = calibration_images(run, config, **about)
        self.images: MeasuredImages | None = evaluation_images(run, config, **about)
        self.check_plan()
        if self.planner.wanted.reconstruct:  # too few images show now, not after the work
            divided(self.windows.num_windows, Reconstruction())
            if self.windows.held_out is None:
                raise none_held_out()
        self._explain(pool)
        self.calibration: Calibration | None = None
        self.shared: Shared | None = None
        if not config.run.images.activations:
            return self._jobs(self.windows)
        self.original = self._jobs(self.windows).profile
        super()._profile(pool, self.original)
        self._quantize_activations(pool)
        return self._on_folded()

    def _on_folded(self) -> Prepared:
        """Jobs on the folded model, by the original's profile."""
        stream = jobs.stream_job(self.context, self.windows)
        profile = replace(self.original, stream=stream)
        candidates = jobs.candidates_job(self.context, profile, specs=self.stream.specs, head=self.head)
        return Prepared(stream=self.stream, stream_job=stream, profile=profile, candidates=candidates)

    def _explain(self, pool: Pool) -> None:
        """Heat maps of the original, shown as soon as they are found."""
        self.heat: HeatReport | None = None
        count = min(self.config.evaluation.heat_maps, self.windows.num_windows)
        if not count:
            return
        try:
            special_tokens(self.stream, self.window_length())
        except ModelError as error:
            self.run_state.warn(f"no heat maps: {error}")
            return
        job = jobs.heat_maps_job(self.context, jobs.stream_job(self.context, self.windows), self.windows, count)
        self.heat = run_heat_maps(self.run_state, pool, job, self.source.config)
        self.heat.publish()

    def _report(self) -> None:
        """Heat maps."""
        if self.heat is None:
            return
        try:
            self.heat.write(self.config.output)
        except OSError as error:  # the checkpoint is there, and its evaluation worth more than pictures
            self.run_state.warn(f"heat maps were not written: {error}")

    def _profile(self, pool: Pool, job: ProfileJob) -> None:
        """Where activations are quantized, the profile is what their grids were found by."""
        if self.calibration is None:
            super()._profile(pool, job)

    def _pose(self, rows: list[CostRow]) -> None:
        """Of a shared budget only a part is the weights': how large it is shows when all costs are known."""
        self.planner.pose(rows, budget_bits=UNQUANTIZED_BITS if self.config.shares_budget() else None)

    def _quantize_activations(self, pool: Pool) -> None:
        """Find the grids and their widths, and go on with the model that they ask for."""
        run, average = self.run_state, self.config.run.images.average_activation_bits
        assert average is not None
        num_blocks = self.stream.num_blocks
        self.grids_job = job = jobs.activations_job(self.context, self.original)
        if run.stored(job.folder, activations.STAGE) is None:
            run.survive(pool, activations.STAGE, lambda: self._search_grids(pool, job))
            run.finish(job.folder, activations.STAGE, {"blocks": num_blocks})
        self.calibration = activations.stored_calibration(job, range(num_blocks))
        if self.config.shares_budget():
            self._share(pool, average)
        elif len(job.widths) > 1:
            self._take(self._chosen(allocate_widths(self.calibration, average_bits=average)))
        else:
            self._take(self._chosen(self.calibration.uniform(average)))

    def _share(self, pool: Pool, average: int) -> None:
        """Choose all widths under one budget, and go on with the model that those of activations ask for."""
        assert self.calibration is not None
        choices = jobs.asked_choices(self.config.run.candidates, self.scale_bits)
        check_share(self.planner, self.calibration, choices, activation_bits=average)
        unfolded = self.source, self.context
        self._take(self._chosen(self.calibration.uniform(average)))
        prepared = self._on_folded()
        rows = run_candidates(self.run_state, pool, prepared.candidates, self.stream)
        job = jobs.responses_job(self.context, prepared.candidates)
        run_responses(self.run_state, pool, job)
        self.shared = share(self.planner, self.calibration, rows, job, activation_bits=average)
        self.source, self.context = unfolded
        self._take(self._chosen(self.shared.widths.places))
        self.planner.give(self.shared.widths.modules, self.planner.cost_rows(rows))
        if self.shared.widths.stopped_early:
            gap = f"{self.shared.gap:.2%}"
            self.run_state.warn(f"the allocation met its time limit: its cost may be {gap} above the best possible")
        if not self.shared.widths.binding:
            self.run_state.warn("the budget is larger than everything at its best width needs; it is not used up")

    def _chosen(self, widths: Mapping[tuple[int, str], int]) -> ChosenGrids:
        return chosen_grids(self.config.store, self.grids_job.folder, widths, self.stream.num_blocks)

    def _search_grids(self, pool: Pool, job: activations.ActivationsJob) -> None:
        parts = activations.shares(activations.missing_blocks(job, self.stream.num_blocks), len(pool))
        calls = [(job, blocks) for blocks in parts]
        each_call(self.run_state, pool, activations.search, calls, label=activations.STAGE, unit="share")

    def _take(self, chosen: ChosenGrids) -> None:
        """Go on with the folded model."""
        self.source = fold(self.source, chosen)
        self.stream = BlockStream(self.source, dtype=DTYPES[self.dtype])
        self.specs = self.stream.specs
        self.planner = Planner(self.config, self.source, self.specs)
        self.context = replace(
            self.context,
            activations=chosen,
            fingerprint=hashlib.sha256(f"{self.context.fingerprint} {chosen.digest}".encode()).hexdigest(),
        )

    def description(self, kept: Contender) -> dict[str, Any]:
        """Images, and widths of activations by block and place."""
        found = super().description(kept) | {
            "images": {"source": self.windows.source, "number": self.windows.num_windows}
        }
        if self.heat is not None:
            found["heat_maps"] = self.heat.document
        chosen = self._grids_of(kept.codes)
        if chosen is None or self.calibration is None:
            return found
        values = {key: place.num_values for key, place in self.calibration.places.items()}
        total = sum(bits * values[block, place] for block, place, bits in chosen.widths)
        places = [{"block": block, "place": place, "bits": bits} for block, place, bits in chosen.widths]
        shared = {} if self.shared is None else {"shared": self.shared.document(even=self._is_even(kept))}
        return found | {"activations": {"average_bits": total / sum(values.values()), "places": places, **shared}}

    def _shared_budget(self, kept: Contender) -> dict[str, Any]:
        """Its unit, what an activation has of it, and the gap of the knapsack, which is one of both."""
        if self.shared is None:
            return {}
        average = self.config.run.images.average_activation_bits
        found: dict[str, Any] = {"asked_activation_bits": average, "shared": self.shared.unit.value, "bound_nats": None}
        return found | ({"gap": None} if self._is_even(kept) else {"gap": self.shared.gap, "method": "exact"})

    def _rows_of(self, kept: Contender, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.shared.rows if self.shared is not None and self._is_even(kept) else rows

    def _is_even(self, kept: Contender) -> bool:
        """Whether a shared budget was spent evenly."""
        return self.shared is not None and kept.codes is self.shared.even_codes

    def _grids_of(self, codes: CodesFrom) -> ChosenGrids | None:
        """Grids that go with codes."""
        return stream_of(jobs.stream_job(self.context, self.windows), codes).activations

    def _uniform(self, stitching: Stitching, plans: Plans) -> Contender | None:
        """Of a shared budget what it gives evenly to weights and activations, whose middle width has its own fold."""
        if self.shared is None:
            return super()._uniform(stitching, plans)
        even = self.shared.even
        return None if even is None else Contender(codes=self.shared.even_codes, plan=even.plan)

    def _on_held_out(
        self, pool: Pool, prepared: Prepared, contenders: Mapping[str, Contender], *, head: CandidatesJob | None
    ) -> Mapping[str, dict[str, Any]]:
        return self._compared(pool, prepared, contenders, paired=(guard.OURS, guard.UNIFORM), label=guard.STAGE)

    def _compared(
        self,
        pool: Pool,
        prepared: Prepared,
        contenders: Mapping[str, Contender],
        *,
        paired: tuple[str, str],
        label: str,
    ) -> Mapping[str, dict[str, Any]]:
        """Scores on the held-out images, which there are."""
        held_out = self.windows.held_out
        assert held_out is not None
        variants = {
            name: StoredClassifierCodes(
                stream=stream_of(prepared.stream_job, c.codes), folder=c.codes, choices=c.plan.choices
            )
            for name, c in contenders.items()
        }
        inputs = {"images": held_out.digest, **{name: contender.key for name, contender in contenders.items()}}
        choices = {name: choices_json(contender.plan.choices) for name, contender in contenders.items()}
        folder = self.run_state.folder(guard.STAGE, inputs=inputs, parameters=choices, code=["tasks.image_scores"])
        job = self._scoring(held_out.key, held_out.num_windows, variants)
        return self._scores(pool, job, folder, label, labelled=False, paired=paired)

    def _rebuilding(self, pool: Pool, prepared: Prepared, start: Contender) -> Rebuilding | None:
        if not self.planner.wanted.reconstruct:
            return None
        job = jobs.rebuild_job(self.context, prepared.stream_job, start)
        rebuilt = replace(start, codes=job.folder)
        return Rebuilding(contender=rebuilt, make=partial(self._rebuilt, pool, prepared, job, start, rebuilt))

    def _rebuilt(
        self, pool: Pool, prepared: Prepared, job: RebuildJob, start: Contender, rebuilt: Contender
    ) -> tuple[Contender, Mapping[str, Any]]:
        outcome = run_rebuild(self.run_state, pool, job, self.stream.num_blocks)
        contenders = {REBUILT: rebuilt, AS_ROUNDED: start}
        scores = self._compared(pool, prepared, contenders, paired=(REBUILT, AS_ROUNDED), label=CHECK)
        helps = reconstruction.helps(scores)
        if not helps and outcome["changed"]:
            self.run_state.warn(
                f"rebuilt blocks have a KL of {scores[REBUILT]['kl_nats']:.4f} nats an image on the held-out images, "
                f"as they were rounded {scores[AS_ROUNDED]['kl_nats']:.4f}: they are left as they were rounded"
            )
        return rebuilt if helps else start, {**outcome, "helps": helps, "held_out": scores}

    def _planned_size(self, codes: StageFolder | CandidatesJob, quantized: Mapping[str, Choice]) -> dict[str, Any]:
        grids = checkpoint_activations(self.specs, self._grids_of(codes), quantized)
        size = planned_size(self.source, quantized, specs=self.specs, activations=grids)
        return {**asdict(size), "average_bits": size.quantized_bits / size.num_quantized_weights}

    def output_bytes(self) -> int:
        """The table of grids counts too."""
        table = self.config.output / TABLE
        return model_bytes(self.config.output) + (table.stat().st_size if table.is_file() else 0)

    def _assembly(
        self,
        codes: StageFolder | CandidatesJob,
        quantized: Mapping[str, Choice],
        manifest: Mapping[str, Any],
        *,
        head: CandidatesJob | None,
    ) -> Call:
        job = AssembleClassifierJob(
            stream=stream_of(jobs.stream_job(self.context, self.windows), codes),
            output=str(self.config.output.absolute()),
            overwrite=self.config.overwrite,
            codes=codes,
            choices=quantized,
            specs=self.specs,
            manifest=manifest,
        )
        return assemble_classifier.assemble, job

    def _evaluation(self, pool: Pool, prepared: Prepared, control: Plan | None, key: str) -> dict[str, Any] | None:
        run, images = self.run_state, self.images
        if images is None:
            return None
        variants: dict[str, ClassifierVariant] = {"lrpq": ClassifierCheckpoint(path=str(self.config.output.absolute()))}
        inputs = {"images": images.digest, "lrpq": key, "model": self.context.fingerprint}
        if control is not None:
            stream = self._control_stream(prepared.stream_job)
            job = jobs.control_job(self.context, stream, control)
            run_refine(run, pool, job, self.stream, label="control")
            variants["control"] = StoredClassifierCodes(stream=stream, folder=job.folder, choices=control.choices)
            inputs["control"] = job.folder.key
        folder = run.folder(
            EVALUATE,
            inputs=inputs,
            parameters={"dtype": self.dtype, "labelled": images.labelled},
            code=["tasks.image_scores"],
        )
        scoring = self._scoring(images.key, images.num_images, variants)
        found = self._scores(pool, scoring, folder, EVALUATE, labelled=images.labelled)
        result: dict[str, Any] = {"source": images.source, "images": images.num_images, **found}
        average = self.config.run.images.average_activation_bits
        if control is not None:
            uniform = next(choice for choice in control.choices.values() if choice is not None)
            beside = "" if average is None else f" A{average}"
            result["control"] |= {"label": f"uniform GPTQ {uniform}{beside}", "all_in_bits": control.average_bits}
        return result

    def _control_stream(self, ours: StreamJob) -> StreamJob:
        """The control's activations have one width everywhere."""
        average = self.config.run.images.average_activation_bits
        if ours.activations is None or self.calibration is None or average is None:
            return ours
        return replace(ours, activations=self._chosen(self.calibration.uniform(average)))

    def _scoring(self, images: str, num_images: int, variants: Mapping[str, ClassifierVariant]) -> ScoreImagesJob:
        return ScoreImagesJob(
            model=str(self.model),
            dtype=self.dtype,
            store=self.config.store,
            images=images,
            num_images=num_images,
            variants=variants,
        )

    def _scores(
        self,
        pool: Pool,
        job: ScoreImagesJob,
        folder: StageFolder,
        label: str,
        *,
        labelled: bool,
        paired: tuple[str, str] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Summaries by variant, that of the first of ``paired`` with the error of its difference to the second; a stage
        of the run."""
        run = self.run_state
        done = run.stored(folder, label)
        if done is None:

            def attempt() -> dict[str, Any]:
                with run.timed(label, 1, "pass"):
                    parts = run.step(label, lambda: pool.each(image_scores.score, job))
                    run.advance(label)
                rows = image_scores.merged(parts)
                found = {name: asdict(image_scores.summarize(rows[name], labelled=labelled)) for name in rows}
                if paired is not None:
                    ours, theirs = paired
                    found[ours][guard.DIFFERENCE_ERROR] = image_scores.paired_error(rows[ours], rows[theirs])
                return found

            done = run.finish(folder, label, {"scores": run.survive(pool, label, attempt)})
        return {name: dict(found) for name, found in done["scores"].items()}
