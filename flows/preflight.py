"""Checks before anything heavy: a mistake must not show after an hour, nor leave anything half written."""

from __future__ import annotations

import json
import os
from pathlib import Path

from flows.config import CompressConfig, EvaluationConfig, PlanConfig
from flows.run_config import default_run_id
from lrpq.checkpoint.publish import MANIFEST, check_output
from lrpq.errors import CalibrationError, ConfigError, ModelError


def preflight(config: CompressConfig) -> None:
    """Check what can be checked without computing: output, texts, store, model; the cheap ones first.

    A hub model is downloaded here, for what follows needs it. Headers of its files are read, no weights.

    Raises:
        LrpqError: the first thing that is wrong.
    """
    preflight_output(
        config.output,
        overwrite=config.overwrite,
        run_id=config.run_id or default_run_id(config.run),
        plan=config.plan,
    )
    _check_apart(config.output, config.run.model, config.store)
    check_named_folder(config.run.model, option="MODEL")
    if config.run.images.source is None:
        check_text(config.run.calibration.source)
        if config.evaluation.enabled and config.evaluation.source is not None:
            check_text(config.evaluation.source)
    check_store(config.store)
    _check_model(config)


def preflight_output(output: Path, *, overwrite: bool, run_id: str, plan: PlanConfig) -> None:
    """Check that the checkpoint of a run may be written to ``output``.

    A folder that already holds this run's checkpoint under this plan passes: the same command twice is no
    mistake, there is just nothing left to do.

    Raises:
        ConfigError: it is not empty (and may not be replaced), no folder, or cannot be written.
    """
    if _holds(output, run_id=run_id, plan=plan):
        return
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"output {output}: is not empty; give another folder, or --overwrite to replace it")
    check_output(output, overwrite=overwrite)
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output {output}: {nearest} is a file, not a folder; give another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output {output}: {nearest} cannot be written; give another folder")


def check_store(store: str) -> None:
    """Open the store, which tests that it can be written.

    Raises:
        LrpqError: see ``open_store``.
    """
    from tasks.store.opened import open_store

    open_store(store)


def check_named_folder(model: str, *, option: str) -> None:
    """Refuse a path that is no folder of safetensors; a hub id passes.

    Raises:
        ModelError: no such folder, or nothing in it that could be a model.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ModelError(f"model {model!r} is a file; give a folder of safetensors or a hub id ({option})")
        if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise ModelError(f"model {model!r}: no such folder; give a folder of safetensors or a hub id ({option})")
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {model!r}: the folder has no config.json; give a folder of safetensors ({option})")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"model {model!r}: the folder has no *.safetensors; save the model as safetensors first")


def preflight_evaluation(
    checkpoint: Path, reference: str, evaluation: EvaluationConfig, *, tasks: bool = False
) -> None:
    """Check what ``lrpq evaluate`` is given; with tasks it needs no text.

    Raises:
        LrpqError: the first thing that is wrong.
    """
    check_named_folder(str(checkpoint.absolute()), option="DIR")
    check_named_folder(reference, option="--reference")
    if evaluation.source is not None:
        check_text(evaluation.source)
    elif not tasks:
        raise ConfigError("nothing to measure on: give --evaluation SOURCE, such as text:FILE, or --tasks FILE.jsonl")


def _holds(output: Path, *, run_id: str, plan: PlanConfig) -> bool:
    """Whether the folder's manifest says that it is this run's checkpoint under this plan."""
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none, or not one of ours: the checks that follow say what is wrong
        return False
    if not isinstance(manifest, dict) or not isinstance(manifest.get("configuration"), dict):
        return False
    same_plan = manifest["configuration"].get("plan") == json.loads(plan.model_dump_json())
    return same_plan and manifest.get("run_id") == run_id


def _check_apart(output: Path, model: str, store: str) -> None:
    """Nothing that is read may lie in the folder that is replaced."""
    inside = {"the model": model, "the store": store}
    for what, place in inside.items():
        if "://" not in place and Path(place).expanduser().absolute().is_relative_to(output.absolute()):
            raise ConfigError(f"output {output}: {what} {place} lies in it; give another folder")


def check_text(source: str) -> None:
    """Refuse a local text that cannot be read: the evaluation's would be opened only at the very end.

    Raises:
        LrpqError: no source, or no readable file with something in it.
    """
    from tasks.calibration.sources import ParquetSource, TextSource, parse_source

    parsed = parse_source(source)
    if not isinstance(parsed, TextSource | ParquetSource) or "://" in parsed.location:
        return
    path = Path(parsed.location)
    if not path.is_file():
        raise CalibrationError(f"{source}: no such file; check the name")
    if not os.access(path, os.R_OK):
        raise CalibrationError(f"{source}: the file cannot be read; check its permissions")
    if path.stat().st_size == 0:
        raise CalibrationError(f"{source}: the file is empty; give a text")


def _check_model(config: CompressConfig) -> None:
    from flows.changes import change_of
    from flows.scales import stored_scale_bits
    from lrpq.model.families import family_of
    from lrpq.model.safetensors_source import resolve_model
    from lrpq.model.source import open_source
    from lrpq.transform.changed import changed

    original = open_source(resolve_model(config.run.model))
    scaled = stored_scale_bits(config.run, original) == 8
    source = changed(original, change_of(config.run, original, scaled=scaled))
    architecture, family = family_of(source.config)
    if family.pooling is not None and config.run.images.source is None:
        raise ConfigError(
            f"{architecture} classifies images: give images to calibrate on with --images FOLDER (or a data set's name)"
        )
    if config.run.images.source is not None:
        if family.pooling is None:
            raise ConfigError(f"--images: {architecture} is no image classifier; give --calibration a text")
        from flows.image_shares import check_images
        from tasks.images.preprocess import Preprocessor

        check_images(config, source.config)
        Preprocessor(source.folder, source.config)
        return
    config.check_parts(tied=bool(source.config.tie_word_embeddings))
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    lengths = {"--length": config.run.calibration.length}
    if config.evaluation.enabled:
        lengths["--evaluation-length"] = config.evaluation.length
    for option, length in lengths.items():
        if longest is not None and length > longest:
            raise ConfigError(
                f"{option} {length}: the model reads at most {longest} tokens (max_position_embeddings); "
                f"give {option} {longest} or less"
            )
