"""Calibration and evaluation windows: read, cut, stored under their key."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flows.config import CompressConfig, EvaluationConfig, evaluation_source
from flows.run import Run
from flows.run_config import RunConfig
from lrpq.errors import ConfigError, ModelError
from lrpq.model.safetensors_source import ModelSource
from tasks.calibration.held_out import default_held_out, split_held_out
from tasks.calibration.load import load_windows
from tasks.calibration.overlap import overlap_warning
from tasks.calibration.pydoc import pydoc_documents
from tasks.calibration.sources import ParquetSource, PydocSource, TextSource, parse_source
from tasks.calibration.stored import read_windows, write_windows
from tasks.calibration.windows import Placement, Windows, tokens_digest
from tasks.store.objects import ObjectStore

STAGE = "calibrate"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWindows:
    """Windows in the store."""

    key: str
    digest: str
    """sha256 of the tokens."""
    num_windows: int
    source: str
    held_out: HeldOut | None = None
    """Windows of the same text beside these; None if there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Windows that nothing is calibrated on."""

    key: str
    digest: str
    num_windows: int


def calibration_windows(run: Run, config: RunConfig, *, model: Path, fingerprint: str) -> StoredWindows:
    """The run's calibration windows and those held out, drawn at random from the source by the run's seed."""
    asked = config.calibration
    held_out = default_held_out(asked.num_windows) if asked.held_out is None else asked.held_out
    return _windows(
        run,
        model=model,
        fingerprint=fingerprint,
        source=asked.source,
        num_windows=asked.num_windows,
        length=asked.length,
        seed=config.seed,
        placement="random",
        text_column=asked.text_column,
        label=STAGE,
        held_out=held_out,
    )


def evaluation_windows(
    run: Run, config: CompressConfig, *, model: Path, fingerprint: str, calibration: StoredWindows
) -> StoredWindows:
    """Windows spread over the evaluation text; warns where the text was calibrated on."""
    asked = config.evaluation
    found = _windows(
        run,
        model=model,
        fingerprint=fingerprint,
        source=_measured_source(asked, calibration=config.run.calibration.source),
        num_windows=asked.num_windows,
        length=asked.length,
        seed=config.run.seed,
        placement="spread",
        text_column=None,
        label="evaluation text",
    )
    warning = overlap_warning(_as_windows(run.store, calibration), _as_windows(run.store, found))
    if warning is not None:
        run.warn(warning)
    return found


def evaluation_only_windows(store: ObjectStore, config: EvaluationConfig, *, model: Path) -> StoredWindows:
    """Windows for measuring a checkpoint outside of a run."""
    if config.source is None:
        raise ConfigError("no evaluation text: give --evaluation SOURCE, e.g. text:FILE")
    windows = load_for(
        model,
        source=config.source,
        num_windows=config.num_windows,
        length=config.length,
        seed=0,
        placement="spread",
        text_column=None,
    )
    key = f"evaluations/windows/{windows.digest[:24]}.parquet"
    write_windows(store, key, windows.tokens)
    return StoredWindows(key=key, digest=windows.digest, num_windows=windows.num_windows, source=windows.source)


def _measured_source(config: EvaluationConfig, *, calibration: str) -> str:
    source = evaluation_source(config, calibration=calibration)
    if source is None:
        raise ConfigError("no evaluation text: evaluation is switched off")
    return source


def _windows(
    run: Run, *, model: Path, fingerprint: str, label: str, num_windows: int, held_out: int = 0, **asked: Any
) -> StoredWindows:
    folder = run.folder(
        STAGE,
        inputs={"model": fingerprint},
        parameters={**asked, "num_windows": num_windows, "held_out": held_out, "text": text_digest(asked["source"])},
        code=["tasks.calibration.load", "tasks.calibration.held_out"],
    )
    key, held_out_key = folder.object("windows.parquet"), folder.object("held-out.parquet")
    extra = run.stored(folder, label)
    if extra is None:
        with run.timed(label, 1, "text"):
            drawn = run.step(label, lambda: load_for(model, num_windows=num_windows + held_out, **asked))
            windows, rest = split_held_out(drawn, num_windows=num_windows)
            write_windows(run.store, key, windows.tokens)
            if len(rest):
                write_windows(run.store, held_out_key, rest)
            run.progress.advance(label)
        if windows.missing_windows:
            run.warn(
                f"{windows.source}: the text holds {windows.num_windows} windows of {windows.length} tokens, "
                f"{windows.asked_windows} were asked for"
            )
        extra = run.finish(
            folder,
            label,
            {
                "digest": windows.digest,
                "num_windows": windows.num_windows,
                "source": windows.source,
                "documents": windows.num_documents,
                "tokens_in_text": windows.stream_tokens,
                "held_out": len(rest),
                "held_out_digest": tokens_digest(rest) if len(rest) else None,
            },
        )
    beside: HeldOut | None = None
    if extra["held_out"]:
        beside = HeldOut(key=held_out_key, digest=extra["held_out_digest"], num_windows=int(extra["held_out"]))
    return StoredWindows(
        key=key,
        digest=extra["digest"],
        num_windows=int(extra["num_windows"]),
        source=extra["source"],
        held_out=beside,
    )


def load_for(
    model: Path,
    *,
    source: str,
    num_windows: int,
    length: int,
    seed: int,
    placement: Placement,
    text_column: str | None = None,
) -> Windows:
    """Read a source with the model's own tokenizer and cut it into windows.

    Raises:
        ConfigError: windows longer than the model reads.
        ModelError: no tokenizer that loads.
        CalibrationError: the source cannot be read, or does not fill one window.
    """
    config = ModelSource(model).config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ConfigError(f"windows of {length} tokens: the model reads at most {longest}; give a shorter length")
    return load_windows(
        parse_source(source),
        load_tokenizer(model),
        num_windows=num_windows,
        length=length,
        seed=seed,
        placement=placement,
        text_column=text_column,
        vocab_size=config.vocab_size,
        model_dir=model,
    )


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
        ModelError: none that loads.
    """
    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the tokenizers library raises is a bad tokenizer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"model {model}: its tokenizer cannot be loaded ({reason})") from error


def text_digest(source: str) -> str:
    """Identity of a local text, so that an edited file is read again; empty for the hub and URLs (unchanging)."""
    parsed = parse_source(source)
    digest = hashlib.sha256()
    if isinstance(parsed, PydocSource):  # the text of the Python that runs
        for document in pydoc_documents(parsed.part):
            digest.update(document.encode())
    elif isinstance(parsed, TextSource | ParquetSource) and Path(parsed.location).is_file():
        with Path(parsed.location).open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    else:
        return ""
    return digest.hexdigest()


def _as_windows(store: ObjectStore, stored: StoredWindows) -> Windows:
    tokens = read_windows(store, stored.key)
    return Windows(
        tokens=tokens,
        source=stored.source,
        documents_digest=stored.digest,
        num_documents=0,
        stream_tokens=tokens.numel(),
        asked_windows=len(tokens),
        exhausted=False,
    )
