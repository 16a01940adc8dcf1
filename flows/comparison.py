"""``lrpq compare``: from what was asked to rows, one at a time, each kept as soon as it is measured."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from flows import ctrl_c
from flows.boundary import refuse_secrets
from flows.calibrate import load_for, text_digest
from flows.compression import resolve_dtype
from flows.config import EvaluationConfig, evaluation_source
from flows.manifest_file import write_manifest_file
from flows.progress import Progress
from flows.run_config import CalibrationConfig, CandidateConfig, RunConfig
from flows.scales import stored_scale_bits
from flows.sections import AUTO, BIT_WIDTHS, GROUP_SIZES, MAX_SEED, Flag, Section, chosen
from lrpq import __version__
from lrpq.allocate.budget import BudgetBits
from lrpq.compare.methods import DEFAULT_METHODS, METHODS, methods_named
from lrpq.compare.run import Comparison, Row
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Workbench
from lrpq.errors import ConfigError
from lrpq.evaluate.divergence import summarize
from lrpq.model.safetensors_source import resolve_model
from lrpq.model.source import open_source
from tasks.calibration.held_out import default_held_out, split_held_out
from tasks.calibration.overlap import overlap_warning
from tasks.model_identity import model_fingerprint
from tasks.opening import resolve_device
from tasks.resources import cut_of
from tasks.store.documents import parse_object
from tasks.store.keys import code_digest
from tasks.streams import DTYPES

FILE = "compare.json"
TERMS = {
    "fingerprint": "another model",
    "dtype": "another dtype",
    "device": "another device",
    "settings": "other settings",
    "texts": "other texts",
    "code": "another version of the code",
}
"""What two rows must share, and how it is called."""
ROW: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("method", "source"), (str,)),
    **dict.fromkeys(("seed", "peak_bytes", "checkpoint_bytes"), (int,)),
    **dict.fromkeys(("budget_bits", "all_in_bits", "predicted_nats", "perplexity", "kl_nats", "top1"), (float, int)),
    "kl_standard_error": (float, int, type(None)),
    "kl_windows": (list,),
    "counts": (dict,),
    **dict.fromkeys(("seconds", "evidence_seconds"), (float, int)),
}
"""Fields of a row that is kept."""
REFERENCE_METHOD = "lrpq"
"""Differences are paired with this method's."""


class CompareConfig(Section):
    """What is compared, on which terms."""

    model: Annotated[str, Field(min_length=1), Flag("MODEL")]
    """Hub id, or folder of safetensors."""
    methods: Annotated[tuple[str, ...], Field(min_length=1, strict=False), Flag("--methods")] = DEFAULT_METHODS
    """Methods, with commas between them; ``weights:*`` stands for all that begin so."""
    budgets: Annotated[tuple[float, ...], Field(min_length=1, strict=False), Flag("--budgets")] = (3.25, 4.25)
    """All-in bits per quantized weight, with commas between them."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_SEED)], ...], Field(min_length=1, strict=False)] = (0,)
    """Seeds of the calibration windows and of the sampled labels."""
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    bits: Annotated[tuple[int, ...], Field(min_length=1, strict=False), Flag("--bits")] = BIT_WIDTHS
    """Code widths to choose from (bits per weight)."""
    group_sizes: Annotated[tuple[int, ...], Field(min_length=1, strict=False), Flag("--group-size")] = (64, -1)
    """Group sizes to choose from (columns that share a scale); -1 is one scale a row."""
    scales: Annotated[Literal["auto", "bfloat16", "float8"], Flag("--scales")] = AUTO
    """What the scales of groups are stored as, as in `lrpq compress`; the controls (uniform GPTQ, rounding to nearest)
    and lrpq without allocation, which then take as many bits, have bfloat16."""

    codes: Annotated[Literal["uniform", "trellis"], Flag("--codes")] = "uniform"
    """What codes are, as in `lrpq compress`; those of the controls are uniform."""

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(methods_named(list(value)))

    @field_validator("budgets")
    @classmethod
    def _budgets(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for bits in value:
            BudgetBits(bits=bits)
        return tuple(sorted(set(value)))

    @field_validator("bits")
    @classmethod
    def _bits(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return chosen(value, BIT_WIDTHS)

    @field_validator("group_sizes")
    @classmethod
    def _group_sizes(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return chosen(value, GROUP_SIZES)

    def settings(self) -> dict[str, Any]:
        """What two rows must share to be compared; methods, budgets and seeds may be added later."""
        whole: dict[str, Any] = json.loads(self.model_dump_json(exclude={"methods", "budgets", "seeds", "model"}))
        return whole


def listed() -> list[dict[str, str]]:
    """All methods: name, axis, source."""
    return [{"method": name, "axis": m.axis.value, "source": m.source} for name, m in METHODS.items()]


class ComparisonRun:
    """One comparison; rows of an earlier one in the same folder are kept and not measured again.

    Raises:
        ConfigError: the folder holds a comparison on other terms, or something else.
    """

    def __init__(
        self, config: CompareConfig, output: Path, progress: Progress, *, device: str, overwrite: bool
    ) -> None:
        self.config, self.output, self.progress = config, output, progress
        self.device = resolve_device(device)
        self.model = resolve_model(config.model)
        self.source = open_source(self.model)
        asked, measured = config.calibration, config.evaluation
        self.text = evaluation_source(measured, calibration=asked.source)
        if self.text is None:
            raise ConfigError("a comparison needs a text to measure on; give --evaluation")
        refuse_secrets(asked.source, self.text)
        self.dtype = resolve_dtype(RunConfig(model=config.model), self.source)
        candidates = CandidateConfig(bits=config.bits, group_sizes=config.group_sizes, scales=config.scales)
        self.scale_bits = stored_scale_bits(RunConfig(model=config.model, candidates=candidates), self.source)
        self.document: dict[str, Any] = {
            "lrpq": __version__,
            "model": config.model,
            "fingerprint": model_fingerprint(self.model),
            "dtype": self.dtype,
            "device": self.device,
            "settings": config.settings(),
            "texts": [text_digest(asked.source), text_digest(self.text)],
            "code": code_digest("lrpq.compare.run", "tasks.calibration.load"),
            "rows": [],
        }
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output {output}: cannot be made ({error.strerror}); give another folder") from error
        if not os.access(output, os.W_OK | os.X_OK):
            raise ConfigError(f"output {output}: cannot be written; give another folder")
        kept = None if overwrite else _read(output / FILE)
        if kept is not None:
            self._continue(kept)

    def _continue(self, kept: dict[str, Any]) -> None:
        for key, name in TERMS.items():
            if kept.get(key) != self.document[key]:
                raise ConfigError(
                    f"{self.output / FILE}: a comparison with {name}; its rows do not compare with these: give another "
                    "--output, or --overwrite"
                )
        rows = kept.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() == ROW.keys() for row in rows):
            raise ConfigError(f"{self.output / FILE}: its rows are damaged; give another --output, or --overwrite")
        whole = all(isinstance(row[key], kind) for row in rows for key, kind in ROW.items())
        if not whole or not all(isinstance(count, int) for row in rows for count in row["counts"].values()):
            raise ConfigError(f"{self.output / FILE}: its rows are damaged; give another --output, or --overwrite")
        self.document["rows"] = rows
        self.document["original"] = kept.get("original")

    def run(self) -> dict[str, Any]:
        """Measure what is missing; the whole document, which also lies in the output folder."""
        methods = methods_named(list(self.config.methods))
        for seed in self.config.seeds:
            done = {(row["method"], row["budget_bits"]) for row in self.document["rows"] if row["seed"] == seed}
            missing = [(name, bits) for bits in self.config.budgets for name in methods if (name, bits) not in done]
            if missing:
                self._measure(missing, seed)
        self.document["table"] = summary(self.document["rows"])
        self._write()
        return self.document

    def _measure(self, missing: Sequence[tuple[str, float]], seed: int) -> None:
        label, started = f"seed {seed}", time.monotonic()
        self.progress.stage(label, len(missing), "row")
        comparison = self._comparison(missing, seed)
        for row in comparison.rows():
            ctrl_c.raise_if_asked()
            self.document["rows"].append(_plain(row, seed=seed))
            self.document["original"] = asdict(summarize(list(comparison.original)))
            self._write()
            self.progress.advance(label, f"{row.method} at {row.budget_bits:g} bits")
        self.progress.done(label, seconds=time.monotonic() - started, reused=False)

    def _comparison(self, missing: Sequence[tuple[str, float]], seed: int) -> Comparison:
        asked, measured = self.config.calibration, self.config.evaluation
        held_out = default_held_out(asked.num_windows) if asked.held_out is None else asked.held_out
        drawn = load_for(
            self.model,
            source=asked.source,
            num_windows=asked.num_windows + held_out,
            length=asked.length,
            seed=seed,
            placement="random",
            text_column=asked.text_column,
        )
        calibration, rest = split_held_out(drawn, num_windows=asked.num_windows)
        tokens = calibration.tokens
        assert self.text is not None
        scored = load_for(
            self.model,
            source=self.text,
            num_windows=measured.num_windows,
            length=measured.length,
            seed=0,
            placement="spread",
        )
        for found in (calibration, scored):
            if found.missing_windows:
                self.progress.note(
                    f"{found.source}: the text holds {found.num_windows} windows of {found.length} tokens, "
                    f"{found.asked_windows} were asked for"
                )
        if (warning := overlap_warning(calibration, scored)) is not None:
            self.progress.note(warning)
        self.document["windows"] = {"calibration": len(tokens), "held_out": len(rest), "evaluation": len(scored.tokens)}
        cut = cut_of(
            device=self.device,
            num_windows=len(tokens),
            length=tokens.shape[1],
            hidden=self.source.config.get_text_config().hidden_size,
        )
        terms = Terms(
            bits=self.config.bits,
            group_sizes=self.config.group_sizes,
            scale_bits=self.scale_bits,
            trellis=self.config.codes == "trellis",
            seed=seed,
            dtype=DTYPES[self.dtype],
            device=self.device,
            shards=cut.shards,
            micro_batch=cut.micro_batch,
        )
        bench = Workbench(self.source, tokens, terms, held_out=rest)
        comparison = Comparison(bench, METHODS, missing, scored.tokens)
        comparison.check()
        return comparison

    def _write(self) -> None:
        write_manifest_file(self.output / FILE, self.document)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give another --output") from error
    try:
        return dict(parse_object(raw))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not a comparison ({error}); give another --output, or --overwrite") from error


def _plain(row: Row, *, seed: int) -> dict[str, Any]:
    found = summarize(list(row.scores))
    return {
        "method": row.method,
        "source": METHODS[row.method].source,
        "seed": seed,
        "budget_bits": row.budget_bits,
        "all_in_bits": row.all_in_bits,
        "predicted_nats": row.predicted_nats,
        **asdict(found),
        "kl_windows": [score.kl_nats for score in row.scores],
        "seconds": row.seconds,
        "evidence_seconds": row.evidence_seconds,
        "peak_bytes": row.peak_bytes,
        "checkpoint_bytes": row.checkpoint_bytes,
        "counts": dict(row.counts),
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method and budget: means over seeds, and the KL's difference to lrpq's, paired by window.

    All seeds are scored on the same windows, so a window's values are averaged over seeds before the standard error is
    taken over windows.
    """
    return list(_summaries(rows))


def _summaries(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    keys = dict.fromkeys((row["budget_bits"], row["method"]) for row in rows)
    ours = {(row["budget_bits"], row["seed"]): row["kl_windows"] for row in rows if row["method"] == REFERENCE_METHOD}
    for budget, method in sorted(keys, key=lambda key: (key[0], list(keys).index(key))):
        found = [row for row in rows if (row["budget_bits"], row["method"]) == (budget, method)]
        kl = _by_window([row["kl_windows"] for row in found])
        both = [row for row in found if (budget, row["seed"]) in ours]
        theirs = _by_window([ours[budget, row["seed"]] for row in both])
        paired = [a - b for a, b in zip(_by_window([row["kl_windows"] for row in both]), theirs, strict=True)]
        yield {
            "budget_bits": budget,
            "method": method,
            "seeds": len(found),
            "all_in_bits": statistics.fmean(row["all_in_bits"] for row in found),
            "kl_nats": statistics.fmean(kl),
            "kl_standard_error": _error(kl),
            "against_lrpq": statistics.fmean(paired) if paired else None,
            "against_lrpq_error": _error(paired),
            "perplexity": statistics.fmean(row["perplexity"] for row in found),
            "predicted_nats": statistics.fmean(row["predicted_nats"] for row in found),
            "seconds": statistics.fmean(row["seconds"] for row in found),
            "peak_mb": max(row["peak_bytes"] for row in found) / 1e6,
            "checkpoint_mb": max(row["checkpoint_bytes"] for row in found) / 1e6,
            "counts": {
                name: sum(row["counts"].get(name, 0) for row in found)
                for name in dict.fromkeys(name for row in found for name in row["counts"])
            },
        }


def _by_window(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*rows, strict=True)]


def _error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
