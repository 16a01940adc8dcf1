"""What a user may ask for: one frozen model a section, the same names in a file, as options and in results.

A file (TOML or JSON) has the sections ``[run]``, ``[run.calibration]``, ``[run.candidates]``, ``[plan]``,
``[evaluation]`` and ``[cluster]``; ``output``, ``overwrite``, ``store`` and ``run_id`` stand above them. A
field that is also an option of the command line names it (``Flag``), and its docstring is the option's help.
Types are strict: the text "3" is no number, and neither is true; a list passes for a tuple.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from flows.kinds import check_kind
from flows.run_config import DEFAULT_CALIBRATION, RunConfig, check_run_id
from flows.sections import AUTO, Flag, Positive, Section, Share, WindowLength
from lrpq.allocate.budget import UNQUANTIZED_BITS, BudgetBits, parse_bytes
from lrpq.allocate.keep import parse_keep
from lrpq.allocate.parts import check_parts
from lrpq.allocate.targets import Target, check_tensor_parallel
from lrpq.errors import BudgetError, ConfigError
from lrpq.model.layers import TRELLIS_WIDTHS

COUNTERPARTS: Mapping[str, str] = {
    "pydoc:calibrate": "pydoc:evaluate",
    "pydoc:evaluate": "pydoc:calibrate",
    DEFAULT_CALIBRATION: "hub:Salesforce/wikitext:wikitext-2-raw-v1:test",
}
"""Calibration source -> text of the same kind that shares nothing with it."""
MAX_HEAT_MAPS = 256


class PlanConfig(Section):
    """The budget, and what may be chosen under it."""

    budget_bits: Annotated[float | None, Flag("--budget")] = None
    """Hard limit on codes, scales and zero points (bits per quantized weight); with several --activations, of both
    together (--share)."""
    budget_bytes: Annotated[int | None, Flag("--budget-bytes")] = None
    """Hard limit on the whole checkpoint (bytes, or a text such as 40GB)."""
    max_kl: Annotated[float | None, Field(gt=0), Flag("--max-kl")] = None
    """Instead of a budget: the smallest checkpoint whose KL divergence to the original on held-out calibration windows
    is no more than this (nats per token)."""
    keep: Annotated[tuple[str, ...], Field(strict=False), Flag("--keep")] = ()
    """PATTERN=BITS: bits of the modules that match; 16 leaves them as they are."""
    target: Annotated[Literal["transformers", "vllm"], Flag("--target")] = "transformers"
    """Runtime that must run the checkpoint."""
    codes: Annotated[Literal["uniform", "trellis"], Flag("--codes")] = "uniform"
    """What codes are: uniform (steps of a grid, which every kernel reads), or trellis (of 2 to 6 bits: as many bytes,
    much less error and much more time; transformers reads them after "import lrpq.loading")."""
    format: Annotated[Literal["compressed-tensors", "dense", "gptq", "trellis"], Flag("--format")] = (
        "compressed-tensors"
    )
    """What quantized weights are stored as: compressed-tensors (packed, for transformers and vLLM); dense (dequantized
    to bfloat16, for any runtime, as large as the original); gptq (packed, 2, 3, 4 and 8 bits, for GPTQModel and
    vLLM); trellis (packed, for transformers with lrpq.loading), which --codes trellis has where nothing is given."""
    tensor_parallel: Annotated[Positive, Flag("--tensor-parallel")] = 1
    """GPUs that share a layer (with --target vllm)."""
    solver: Annotated[Literal["exact", "lagrangian"], Flag("--solver")] = "exact"
    """How the bits are allocated."""
    refine: Annotated[Literal["sequential", "stitch"], Flag("--refine")] = "sequential"
    """sequential: quantize again behind the quantized prefix; stitch: the stored candidates (seconds, lower
    quality; with --cost-rows they are made for the plan)."""
    share: Annotated[Literal["bits", "operations", "none"], Flag("--share")] = "bits"
    """With several --activations, what --budget and their middle width are a budget of, for weights and activations
    together: bits (an image's activations and every weight once), operations (bit operations an image; scales do not
    count), or none: weights and activations each keep to their own average."""
    reconstruct: Annotated[bool, Flag("--reconstruct")] = False
    """Of an image classifier: learn codes, scales and activation steps of each block on the error of its outputs, and
    keep them where that falls on calibration images that were held out of it; takes minutes."""
    correction: Share = 0.5
    """Strength a of the weight correction before quantizing (share; 0 is none)."""
    correction_damping: Annotated[float, Field(gt=0, le=10)] = 0.1
    """Added to the diagonal of the matrix the correction inverts (share of the diagonal's mean)."""

    polish: Annotated[int, Field(ge=0, le=20)] = 2
    """Rounds of coordinate descent on the codes and a refit of the scales after rounding; 0 is none. Of trellis codes
    one at most, which takes every column to its best stream given the others."""
    row_blocks: Annotated[int, Field(ge=1, le=64)] = 12
    """Blocks of a layer's rows, of at least 48 each, each of which makes up for the errors of those before it in what
    the loss feels; 1 rounds every row on its own."""

    @model_validator(mode="before")
    @classmethod
    def _format_of_codes(cls, values: Any) -> Any:
        """Trellis codes have a format of their own."""
        if isinstance(values, Mapping) and values.get("codes") == "trellis":
            return {"format": "trellis", **values}
        return values

    @field_validator("budget_bytes", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("keep")
    @classmethod
    def _keep_rules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(parse_keep(rule)) for rule in value)

    @model_validator(mode="after")
    def _one_budget(self) -> PlanConfig:
        given = [b for b in (self.budget_bits, self.budget_bytes, self.max_kl) if b is not None]
        if not given:
            raise ConfigError("no budget: give --budget BITS, --budget-bytes SIZE or --max-kl NATS")
        if len(given) > 1:
            raise ConfigError("two budgets: give one of --budget BITS, --budget-bytes SIZE and --max-kl NATS")
        if self.budget_bits is not None:
            BudgetBits(bits=self.budget_bits)
        if self.budget_bytes is not None and self.budget_bytes <= 0:
            raise BudgetError(f"budget of {self.budget_bytes} bytes: expected a positive number")
        if self.budget_bytes is not None and self.format == "dense":
            raise ConfigError(
                "--budget-bytes with --format dense: dense weights take what they took; give --budget BITS"
            )
        check_tensor_parallel(Target(self.target), self.tensor_parallel)
        self._check_codes()
        return self

    def _check_codes(self) -> None:
        if self.codes == "uniform":
            if self.format == "trellis":
                raise ConfigError("--format trellis: is for --codes trellis; give that too, or leave the format out")
            return
        if self.target != Target.TRANSFORMERS.value:
            raise ConfigError(f"--codes trellis with --target {self.target}: it has no kernels for them; leave one out")
        if self.format not in ("trellis", "dense"):
            raise ConfigError(
                f"--codes trellis with --format {self.format}: its readers would take symbols for steps of a grid; "
                "leave the format out, or give dense"
            )


class EvaluationConfig(Section):
    """What the result is measured on."""

    source: Annotated[str | None, Flag("--evaluation")] = None
    """Text to measure on, written as for --calibration; that text's counterpart if not given. With --images, images
    written as there; further ones of the same if not given."""
    num_windows: Annotated[Positive, Flag("--evaluation-windows")] = 32
    """Windows that are measured (sequences)."""
    length: Annotated[WindowLength, Flag("--evaluation-length")] = 512
    """Tokens of an evaluation window."""
    num_images: Annotated[Positive, Flag("--evaluation-images")] = 1000
    """Images of an image classifier that are measured, at most."""
    top1: Annotated[bool | None, Flag("--top1", "--no-top1")] = None
    """Measure how often the likeliest class is the image's; where images have labels, if not given."""
    heat_maps: Annotated[int, Field(ge=0, le=MAX_HEAT_MAPS), Flag("--heat-maps")] = 4
    """Calibration images of an image classifier whose heat maps (relevance of the patches for the likeliest class) are
    left in the output folder; 0 is none."""
    control: Annotated[bool, Flag("--control", "--no-control")] = True
    """Also measure uniform GPTQ at the nearest width."""
    forecast: Annotated[bool, Flag("--forecast", "--no-forecast")] = True
    """Say before the refinement what KL divergence to expect; without --evaluate on held-out calibration windows."""
    enabled: Annotated[bool, Flag("--evaluate", "--no-evaluate")] = True
    """Measure perplexity and KL divergence."""


class ClusterConfig(Section):
    """Where it is computed; changes no result."""

    workers: Annotated[Positive | None, Flag("--workers")] = None
    """Worker processes; one a core or GPU if not given."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Flag("--device")] = "auto"
    """Where layers are computed."""
    address: Annotated[str | None, Flag("--address")] = None
    """Ray cluster to use; one is started here if not given."""
    patience: Annotated[float, Field(gt=0)] = 30.0
    """A worker that answers to nothing for longer than this, and than five of its usual steps, is ended and replaced
    (seconds)."""
    kept_bytes: Annotated[int | None, Field(ge=0)] = None
    """Memory that a worker may fill with block inputs (bytes); its share of a quarter of the free memory if not given.
    The rest goes to disk."""
    spill_folder: Path | None = None
    """Folder for that, on a local disk of every machine; the system's temporary folder if not given."""
    low_memory: Annotated[bool, Flag("--low-memory")] = False
    """On GPUs, what is not at work waits in host memory: less memory of the GPU, more time, the same result."""


def cache_folder() -> Path:
    """``lrpq`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lrpq"


def default_store() -> str:
    """``LRPQ_STORE``, or a folder in the user's cache."""
    return os.environ.get("LRPQ_STORE") or str(cache_folder() / "store")


class CompressConfig(Section):
    """One compression."""

    run: RunConfig
    plan: PlanConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    output: Annotated[Path, Flag("--output")]
    """Folder for the checkpoint."""
    overwrite: Annotated[bool, Flag("--overwrite")] = False
    """Replace an earlier checkpoint of lrpq in the output folder."""
    store: Annotated[str, Field(default_factory=default_store), Flag("--store")]
    """Folder or s3://bucket/prefix for what is computed on the way; $LRPQ_STORE if not given."""
    run_id: Annotated[str | None, Flag("--run-id")] = None
    """Name of the run in the store; made from the model and its settings if not given."""

    @field_validator("run_id")
    @classmethod
    def _valid_run_id(cls, value: str | None) -> str | None:
        return value if value is None else check_run_id(value)

    @model_validator(mode="before")
    @classmethod
    def _scales_that_load(cls, values: Any) -> Any:
        """A new run says what it stores, whatever its later plans ask for; a stored one has said it."""
        run = values.get("run") if isinstance(values, Mapping) else None
        if not isinstance(run, Mapping):
            return values
        candidates = run.get("candidates", {})
        if not isinstance(candidates, Mapping) or candidates.get("scales", AUTO) != AUTO:
            return values
        plan = values.get("plan", {})
        asked = plan.model_dump() if isinstance(plan, PlanConfig) else plan
        if not isinstance(asked, Mapping) or (
            asked.get("target", "transformers") == "transformers" and asked.get("format") != "gptq"
        ):
            return values
        return {**values, "run": {**run, "candidates": {**candidates, "scales": "bfloat16"}}}

    @model_validator(mode="after")
    def _consistent(self) -> CompressConfig:
        check_kind(self)
        widths = self.run.candidates.bits
        self.check_parts(tied=False)  # as far as is known without the model
        if self.run.candidates.scales == "float8":
            self.check_scales(scale_bits=8)
        for rule in map(parse_keep, self.plan.keep):
            if rule.bits != UNQUANTIZED_BITS and rule.bits not in widths:
                raise ConfigError(
                    f"keep rule '{rule}': {rule.bits} bits are not among the choices (--bits); use "
                    f"{', '.join(map(str, widths))} or {UNQUANTIZED_BITS}"
                )
        smallest = self.run.candidates.smallest_bits()
        alone = not self.shares_budget()  # of a shared budget only a part is the weights'
        if alone and self.plan.budget_bits is not None and self.plan.budget_bits < smallest:
            raise BudgetError(
                f"budget of {self.plan.budget_bits:g} bits is impossible with these choices; the smallest "
                f"possible is {smallest:g} bits ({min(widths)}-bit codes and their scales); raise --budget "
                "or allow narrower choices"
            )
        self._check_candidates()
        self.evaluation_source()
        return self

    def _check_candidates(self) -> None:
        """Refuse trellis codes without a width that has them, and where candidates' codes, which are uniform, would
        have to be those of a plan."""
        if self.plan.codes == "uniform":
            return
        if not set(self.run.candidates.bits) & set(TRELLIS_WIDTHS):
            asked = ", ".join(map(str, self.run.candidates.bits))
            raise ConfigError(f"--codes trellis: has 2 to 6 bits, and --bits asks for {asked}; leave one out")
        if self.run.candidates.cost_rows is not None:
            return
        wants = "--refine stitch" if self.plan.refine == "stitch" else "--max-kl" if self.plan.max_kl else None
        if wants is not None:
            raise ConfigError(
                f"{wants} with --codes trellis: takes stored candidates, whose codes are uniform; a run that is "
                "compressed with --cost-rows makes a plan's codes when they are wanted"
            )

    def shares_budget(self) -> bool:
        """Whether weights and activations have one budget: where activations have widths to choose from."""
        return self.plan.share != "none" and len(self.run.images.activations) > 1

    def evaluation_source(self) -> str | None:
        """See ``evaluation_source``; of an image classifier its images, where no others are named."""
        if self.run.images.source is not None:
            return (self.evaluation.source or self.run.images.source) if self.evaluation.enabled else None
        return evaluation_source(self.evaluation, calibration=self.run.calibration.source)

    def check_parts(self, *, tied: bool) -> None:
        """Refuse to quantize a head or embeddings that the target does not load or the format does not hold.

        Args:
            tied: the model's head has the embedding's weight.

        Raises:
            ConfigError: the option, the reason, and what to do instead.
        """
        asked = self.run.candidates
        check_parts(
            Target(self.plan.target),
            format=self.plan.format,
            head=asked.quantize_head is not None,
            embeddings=asked.quantize_embeddings is not None,
            tied=tied,
        )

    def needs_wide_scales(self) -> str | None:
        """What of the plan reads scales of 16 bits alone, and why; None where nothing does."""
        if self.plan.target != Target.TRANSFORMERS.value:
            return f"--target {self.plan.target}: its kernels read scales of 16 bits"
        return "--format gptq: it has scales of 16 bits" if self.plan.format == "gptq" else None

    def check_scales(self, *, scale_bits: int, experts: bool = False) -> None:
        """Refuse float8 scales where they do not load.

        Args:
            scale_bits: of a group's scale, as resolved for the model.
            experts: the model is a mixture of experts.

        Raises:
            ConfigError: the option, the reason, and what to do instead.
        """
        if scale_bits != 8:
            return
        if reason := self.needs_wide_scales():
            raise ConfigError(f"{reason}, and this run's are float8 (--scales); compress with --scales bfloat16")
        if experts and self.plan.format == "compressed-tensors":
            raise ConfigError(
                "--scales float8 for a mixture of experts: transformers gives packed experts the type of their scales, "
                "and does not compute in float8; leave it out, or give --format dense"
            )


def evaluation_source(evaluation: EvaluationConfig, *, calibration: str) -> str | None:
    """Return the source to measure on; None if nothing is measured.

    Raises:
        ConfigError: none given, and the calibration text has no counterpart.
    """
    if not evaluation.enabled:
        return None
    found = evaluation.source or COUNTERPARTS.get(calibration)
    if found is None:
        raise ConfigError(
            f"no text to measure on: calibration text {calibration!r} has no counterpart; give --evaluation "
            "SOURCE (such as text:FILE) or --no-evaluate"
        )
    return found
