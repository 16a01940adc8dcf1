"""What the stored profile and candidates depend on: a run of this configuration, whatever its budgets."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from flows.sections import (
    ACTIVATION_BITS,
    AUTO,
    BIT_WIDTHS,
    GROUP_SIZES,
    MAX_SEED,
    PER_CHANNEL,
    SCALE_BITS,
    Flag,
    Positive,
    Section,
    Share,
    WindowLength,
    chosen,
)
from lrpq.errors import ConfigError
from tasks.store.documents import canonical_text, sha256_text

DEFAULT_CALIBRATION = "hub:Salesforce/wikitext:wikitext-2-raw-v1:train"
RUN_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SLUG_CHARS = 55  # leaves room for "-" and 8 digits in a run id


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
    budget counts it, and what it saves goes into wider codes. auto is float8 where the model and what will load the
    result allow it, else bfloat16."""
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
    shards: Positive | None = None
    """Parts that the calibration windows are cut into, whatever the number of workers. None: 8; on a GPU fewer where
    that fills micro-batches, but two."""
    micro_batch: Positive | None = None
    """Windows computed at once (sequences). None: 4 on a CPU; on a GPU as many as make 65,536 tokens, fewer for models
    wider than 1,024."""
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


def stored_run(stored: dict[str, Any]) -> RunConfig:
    """A stored run as this version understands it: fields that came later have their defaults, or what was so then.

    Raises:
        ValidationError: this version does not understand it.
    """
    candidates = stored.get("candidates")
    if isinstance(candidates, dict):
        stored = {**stored, "candidates": {"scales": "bfloat16", **candidates}}
    return RunConfig.model_validate_json(json.dumps(stored))


def read_configuration(stored: dict[str, Any]) -> dict[str, Any]:
    """The same as a document; one that this version does not understand is left as it is."""
    try:
        run = stored_run(stored)
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
