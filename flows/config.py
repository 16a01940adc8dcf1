"""What a user may ask for: one frozen model a section, the same names in a file, as options and in results.

A file (TOML or JSON) has the sections ``[run]``, ``[run.calibration]``, ``[run.candidates]``, ``[plan]``,
``[evaluation]`` and ``[cluster]``; ``output``, ``overwrite``, ``store`` and ``run_id`` stand above them. A
field that is also an option of the command line names it (``Flag``), and its docstring is the option's help.
Types are strict: the text "3" is no number, and neither is true; a list passes for a tuple.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flows.kinds import check_kind
from lrpq.allocate.budget import UNQUANTIZED_BITS, BudgetBits, parse_bytes
from lrpq.allocate.keep import parse_keep
from lrpq.allocate.parts import check_parts
from lrpq.allocate.targets import Target, check_tensor_parallel
from lrpq.errors import BudgetError, ConfigError
from tasks.store.documents import canonical_text, sha256_text

DEFAULT_CALIBRATION = "hub:Salesforce/wikitext:wikitext-2-raw-v1:train"
COUNTERPARTS: Mapping[str, str] = {
    "pydoc:calibrate": "pydoc:evaluate",
    "pydoc:evaluate": "pydoc:calibrate",
    DEFAULT_CALIBRATION: "hub:Salesforce/wikitext:wikitext-2-raw-v1:test",
}
"""Calibration source -> text of the same kind that shares nothing with it."""
BIT_WIDTHS = (2, 3, 4, 5, 6, 8)
PER_CHANNEL = -1
AUTO: Literal["auto"] = "auto"
SCALE_BITS = {"bfloat16": 16, "float8": 8}
GROUP_SIZES = (32, 64, 128, PER_CHANNEL)
ACTIVATION_BITS = (2, 3, 4, 5, 6, 7, 8)
RUN_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SLUG_CHARS = 55  # leaves room for "-" and 8 digits in a run id
MAX_HEAT_MAPS = 256
MAX_SEED = 2**63 - 1  # what torch.Generator takes


@dataclass(frozen=True, slots=True)
class Flag:
    """The option of the command line that sets a field."""

    name: str
    """Such as ``--budget``; the name of the argument for ``MODEL``."""
    off: str = ""
    """The option that sets it to false, such as ``--no-control``."""


class Section(BaseModel):
    """Base of all sections: immutable, strict, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


def chosen(value: tuple[int, ...], known: tuple[int, ...]) -> tuple[int, ...]:
    """Known values, each once, in one order: how they were written must not make another run."""
    for item in value:
        if item not in known:
            raise ValueError(f"{item} is not one of {', '.join(map(str, known))}")
    return tuple(item for item in known if item in value)


Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
WindowLength = Annotated[int, Field(ge=2)]
"""Tokens; the first one predicts the second."""


class CalibrationConfig(Section):
    """The text whose tokens decide what is relevant."""

    source: Annotated[str, Flag("--calibration")] = DEFAULT_CALIBRATION
    """Calibration text: hub:DATASET[:CONFIG[:SPLIT]], text:FILE_OR_URL, parquet:FILE_OR_URL, pydoc:calibrate
    or self (sampled from the model)."""
    num_windows: Annotated[Positive, Flag("--calibration-windows")] = 128
    """Calibration windows (sequences)."""
    length: Annotated[WindowLength, Flag("--length")] = 2048
    """Tokens of a calibration window, at most the model's max_position_embeddings."""
    held_out: Annotated[int | None, Field(ge=0), Flag("--held-out-windows")] = None
    """Further windows of the same text that nothing is calibrated on: the result must be no worse on them than the
    uniform candidate, or that is what is written; 0 skips it; an eighth of the calibration windows, at most 16, if not
    given (of images, half as many as are calibrated on, and worse is by more than two standard errors)."""
    text_column: Annotated[str | None, Flag("--text-column")] = None
    """Column that holds the text of a hub or Parquet source; found by itself if not given."""


class ImagesConfig(Section):
    """Of an image classifier: the images that take the place of text, and its activations."""

    source: Annotated[str | None, Flag("--images")] = None
    """Images of an image classifier, in place of calibration text: FOLDER (a folder a class, or files without labels)
    or hub:DATASET[:CONFIG[:SPLIT]]."""
    num_images: Annotated[Positive, Flag("--calibration-images")] = 128
    """Images to calibrate on, drawn by the seed; --held-out-windows more are held out."""
    activations: Annotated[tuple[int, ...], Field(strict=False), Flag("--activations")] = ()
    """Widths of activations to choose from (bits); of several --budget has room for the middle one, or with --share
    none it is their average; none leaves activations as they are."""

    @field_validator("activations")
    @classmethod
    def _known_widths(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        found = chosen(value, ACTIVATION_BITS)
        if found and len(found) % 2 == 0:
            raise ValueError(f"{', '.join(map(str, found))} have no middle width to average to; give an odd number")
        return found

    @property
    def average_activation_bits(self) -> int | None:
        """The middle width; None where activations stay as they are."""
        return self.activations[len(self.activations) // 2] if self.activations else None


class CandidateConfig(Section):
    """The choices that GPTQ prepares for every layer."""

    bits: Annotated[tuple[int, ...], Field(min_length=1, strict=False), Flag("--bits")] = BIT_WIDTHS
    """Code widths to choose from (bits per weight)."""
    group_sizes: Annotated[tuple[int, ...], Field(min_length=1, strict=False), Flag("--group-size")] = (64, -1)
    """Group sizes to choose from (columns that share a scale); -1 is one scale a row."""
    scales: Annotated[Literal["auto", "bfloat16", "float8"], Flag("--scales")] = AUTO
    """What the scales of groups are stored as. float8 (e4m3) takes half of the bytes and has 4 significant digits; the
    budget counts it, and what it saves goes into wider codes. auto is float8 where model, --target and --format allow
    it, else bfloat16."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to the diagonal of a Hessian (share of the diagonal's mean)."""
    grid: Literal["signed", "symmetric"] = "signed"
    """signed lets a scale be negative, so that the extra negative code serves the side that needs it: the same
    bytes, less error; symmetric keeps every scale positive."""
    cost_rows: Annotated[Positive | None, Flag("--cost-rows")] = None
    """Rows of a layer that are quantized at every choice to find what it would cost; codes are then made of the choices
    that a plan takes. None quantizes all rows and keeps the codes of all choices."""
    quantize_head: Annotated[int | None, Flag("--quantize-head")] = None
    """Code width of the language-model head (bits per weight), counted in the budget; left as it is if not given.
    Untied heads only, with --target transformers."""
    quantize_embeddings: Annotated[int | None, Flag("--quantize-embeddings")] = None
    """The same of the token embedding; refused for every target there is, as none loads it packed."""

    @model_validator(mode="after")
    def _scales_of_groups(self) -> CandidateConfig:
        if self.scales == "float8" and self.group_sizes == (PER_CHANNEL,):
            raise ConfigError(
                "--scales float8 with --group-size channel: one scale a row keeps 16 bits; give a group size, or leave "
                "--scales out"
            )
        return self

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return chosen(value, BIT_WIDTHS)

    @field_validator("quantize_head", "quantize_embeddings")
    @classmethod
    def _known_width(cls, value: int | None) -> int | None:
        return value if value is None else chosen((value,), BIT_WIDTHS)[0]

    @field_validator("group_sizes")
    @classmethod
    def _known_group_sizes(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return chosen(value, GROUP_SIZES)

    def smallest_bits(self) -> float:
        """All-in bits per weight of the smallest choice, where its group size divides the row, or of the head's."""
        head = math.inf if self.quantize_head is None else float(self.quantize_head)
        if PER_CHANNEL in self.group_sizes:
            return min(float(min(self.bits)), head)
        scale_bits = min(SCALE_BITS.values()) if self.scales == AUTO else SCALE_BITS[self.scales]
        return min(min(self.bits) + scale_bits / max(self.group_sizes), head)


class RunConfig(Section):
    """What the stored profile and candidates depend on; a run id stands for one of these."""

    model: Annotated[str, Field(min_length=1), Flag("MODEL")]
    """Hub id, or folder of safetensors."""
    calibration: CalibrationConfig = CalibrationConfig()
    images: ImagesConfig = ImagesConfig()
    candidates: CandidateConfig = CandidateConfig()
    relevance: Annotated[Literal["fisher", "lrp", "cp-lrp", "blend"], Flag("--relevance")] = "blend"
    """Where token weights come from (LRP is patented; fisher avoids it)."""
    relevance_floor: Share = 0.03
    """Weight that every token gets (share of the mean weight)."""
    relevance_power: Share = 0.5
    """Exponent of the token weights; 0 weighs all tokens alike."""
    gradients_every: Annotated[Positive, Flag("--gradients-every")] = 1
    """Of how many calibration windows one has its gradients taken. Above 1 gradients decide the bits and nothing else:
    all tokens weigh the same, rows are rounded on their own; it needs --relevance fisher."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), Flag("--seed")] = 0
    """Seed of the sampled windows and labels."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Flag("--dtype")] = "auto"
    """Weights and activations while computing."""
    rotate: Annotated[Literal["none", "hadamard"], Flag("--rotate")] = "none"
    """hadamard rotates the residual stream and each block's values before anything is measured: the same function,
    weights without outliers; unties a tied head, whose bytes then count."""
    shards: Positive = 8
    """Parts that the calibration windows are cut into, whatever the number of workers."""
    micro_batch: Positive | None = None
    """Windows computed at once (sequences). None: 4 on a CPU; on a GPU as many as make 16,384 tokens, fewer for wide
    models."""
    threads: Annotated[Positive, Flag("--threads")] = 1
    """Threads of a worker (cores); part of a result's identity."""

    @model_validator(mode="before")
    @classmethod
    def _scale_a_row(cls, values: Any) -> Any:
        """With quantized activations rows have one scale each, where nothing else is asked for."""
        images = values.get("images") if isinstance(values, Mapping) else None
        candidates = values.get("candidates", {}) if isinstance(values, Mapping) else None
        if not (isinstance(images, Mapping) and images.get("activations") and isinstance(candidates, Mapping)):
            return values
        return {**values, "candidates": {"group_sizes": [PER_CHANNEL], **candidates}}

    @model_validator(mode="after")
    def _integer_arithmetic(self) -> RunConfig:
        if self.images.activations and self.candidates.group_sizes != (PER_CHANNEL,):
            raise ConfigError(
                "--group-size with --activations: layers run in integer arithmetic, which has one scale a row; "
                "leave it out or give channel"
            )
        if self.images.activations and self.dtype == "bfloat16":
            raise ConfigError("--dtype bfloat16 with --activations: scales are folded in float32; leave it out")
        return self

    @model_validator(mode="after")
    def _gradients_for_weights(self) -> RunConfig:
        if self.gradients_every > 1 and self.relevance != "fisher":
            raise ConfigError(
                f"--gradients-every {self.gradients_every} with --relevance {self.relevance}: tokens without "
                "gradients have no relevance; take --relevance fisher, or gradients of every window"
            )
        return self


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
    format: Annotated[Literal["compressed-tensors", "dense", "gptq"], Flag("--format")] = "compressed-tensors"
    """What quantized weights are stored as: compressed-tensors (packed, for transformers and vLLM); dense (dequantized
    to bfloat16, for any runtime, as large as the original); gptq (packed, 2, 3, 4 and 8 bits, for GPTQModel and
    vLLM)."""
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
    """Rounds of coordinate descent on the codes and a refit of the scales after rounding; 0 is none."""
    row_blocks: Annotated[int, Field(ge=1, le=64)] = 4
    """Blocks of a layer's rows, each of which makes up for the errors of those before it in what the loss feels; 1
    rounds every row on its own."""

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
        return self


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
        self.evaluation_source()
        return self

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
            raise ConfigError(f"--scales float8 with {reason}; compress with --scales bfloat16")
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


def check_run_id(run_id: str) -> str:
    """Return the run id.

    Raises:
        ConfigError: not a run id.
    """
    if not RUN_ID.fullmatch(run_id):
        raise ConfigError(
            f"run id {run_id!r}: expected up to 64 of a-z 0-9 . _ - that begin with a letter or digit, "
            "such as smollm2-wiki"
        )
    return run_id


def read_configuration(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored run's configuration as this version understands it: fields that came later have their defaults.

    One that this version does not understand is left as it is.
    """
    try:
        run = RunConfig.model_validate_json(json.dumps(stored))
    except ValidationError:
        return stored
    return dict(json.loads(run.model_dump_json()))


def default_run_id(run: RunConfig) -> str:
    """Name a configuration: the model's base name and 8 digits over all of it (``smollm2-135m-0f3a9c11``).

    The budget is no part of it, so that another budget finds the candidates.
    """
    base = os.path.basename(run.model.rstrip("/"))
    slug = re.sub(r"[^a-z0-9._-]+", "-", base.lower()).strip("._-")[:SLUG_CHARS] or "model"
    return f"{slug}-{sha256_text(canonical_text(run.model_dump(mode='json')))[:8]}"
