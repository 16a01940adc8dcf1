"""Writing the mixed-precision checkpoint: planned to the byte, streamed, published whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lrpq.allocate.targets import Target
from lrpq.checkpoint.activations import TABLE, StoredActivations, input_values
from lrpq.checkpoint.describe import config_text
from lrpq.checkpoint.formats import FORMATS, CheckpointFormat
from lrpq.checkpoint.layout import INDEX_FILE, index_text, open_shard
from lrpq.checkpoint.modules import WEIGHT, ExpertScope, check_experts
from lrpq.checkpoint.plan import MAX_SHARD_BYTES, CheckpointSize, plan_checkpoint, planned_size
from lrpq.checkpoint.publish import MANIFEST, check_output, published_folder
from lrpq.errors import CheckpointError, ConfigError
from lrpq.model.layers import Choice, LinearSpec
from lrpq.model.safetensors_source import ModelSource
from lrpq.quant.grid import QuantizedWeight

__all__ = [
    "CheckpointSize",
    "CodeLoader",
    "check_destination",
    "check_space",
    "codes_of",
    "expert_scope",
    "manifest_text",
    "planned_size",
    "write_beside_weights",
    "write_checkpoint",
]

# What loading and using the model needs besides weights. A model card describes the original and is left out;
# so is code, which would ask for trust_remote_code.
CARRIED = (
    "tokenizer*.json",
    "tokenizer*.model*",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece*.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)

CodeLoader = Callable[[str], QuantizedWeight | None]
"""Module name -> its codes, loaded when asked for; None where there are none."""


def write_checkpoint(
    source: ModelSource,
    output: Path,
    *,
    quantized: CodeLoader,
    choices: Mapping[str, Choice],
    specs: Sequence[LinearSpec] = (),
    manifest: Mapping[str, Any],
    format: CheckpointFormat = CheckpointFormat.COMPRESSED_TENSORS,
    target: Target = Target.TRANSFORMERS,
    activations: StoredActivations | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    prove: Callable[[Path], object] | None = None,
) -> CheckpointSize:
    """Write the checkpoint to ``output``, which appears complete or not at all.

    Tensors are streamed: one copied tensor, or one module's codes and their packed form, are in memory.
    The bytes of everything but ``lrpq.json`` follow from the source, the codes and the choices alone.

    Args:
        source: the original; its tensors that are not quantized are copied as they are.
        output: a new or empty folder.
        quantized: gives the codes of a module in ``choices``; called once for each, in natural order.
        choices: module name -> bits and group size; modules that are not named stay dense.
        specs: the model's linear layers, which say how a module lies on disk; one that has none is
            ``name + '.weight'`` there.
        manifest: contents of ``lrpq.json``.
        format: what quantized modules are stored as.
        target: what will load the checkpoint; it limits the choices of experts (`modules.ExpertScope`).
        activations: grids to store beside the weights, of a classifier.
        max_shard_bytes: bytes of tensors in a file; a larger module has a file of its own.
        overwrite: replace a checkpoint that lies at ``output`` once the new one is complete.
        prove: called with the complete folder before it is published; what it raises leaves ``output`` untouched.

    Raises:
        ConfigError: the output is taken, the disk is too small, a choice does not fit its module, or the target
            does not load experts of these choices.
        ModelError: a module to quantize is not a linear layer of the source.
        CheckpointError: codes are missing, are not what the choices say, cannot be stored, or writing failed.
    """
    output = check_destination(source, output, overwrite=overwrite)
    own = {CheckpointFormat.GPTQ: "GPTQ", CheckpointFormat.TRELLIS: "lrpq"}
    check_experts(choices, specs, scope=expert_scope(format, target), loader=own.get(format, target.value))
    plan = plan_checkpoint(
        source, choices, specs=specs, format=format, activations=activations, max_shard_bytes=max_shard_bytes
    )
    texts = {"config.json": config_text(source, choices, specs, format, activations), MANIFEST: manifest_text(manifest)}
    if activations is not None:
        texts[TABLE] = activations.text
    if len(plan.shards) > 1:
        num_parameters = sum(math.prod(source.shape(name)) for name in source.names())
        texts[INDEX_FILE] = index_text(plan.shards, num_parameters=num_parameters)
    with published_folder(output, overwrite=overwrite) as folder:
        check_space(folder, output, plan.size.total_bytes)
        for shard in plan.shards:
            with open_shard(folder, shard) as writer:
                for unit in shard.units:
                    module = plan.modules.get(unit[0].name)
                    if module is None:
                        writer.write(unit[0].name, source.read(unit[0].name))
                        continue
                    weight = codes_of(module.name, quantized, choice=module.choice, shape=module.shape)
                    for part, replaced in module.split(weight):
                        tensors = FORMATS[format].pack(part, replaced)
                        if activations is not None and module.name in activations.inputs:
                            stem = replaced.name.removesuffix(WEIGHT)
                            tensors |= input_values(stem, activations.inputs[module.name])
                        for name, values in tensors.items():
                            writer.write(name, values)
        write_beside_weights(source, folder, texts, output=output)
        if prove is not None:
            prove(folder)
    return plan.size


def check_destination(source: ModelSource, output: Path, *, overwrite: bool = False) -> Path:
    """The resolved output folder, checked before any work.

    Raises:
        ConfigError: the output is taken (``publish.check_output``), or holds the original.
    """
    output = output.resolve()
    original = source.folder.resolve()
    if output == original or output in original.parents:
        raise ConfigError(f"output {output}: holds the original model, which would be lost; give another folder")
    check_output(output, overwrite=overwrite)
    return output


def check_space(folder: Path, output: Path, total_bytes: int) -> None:
    """Compare the disk that ``folder`` is on with what will be written there.

    Raises:
        ConfigError: the disk is too small.
    """
    free = shutil.disk_usage(folder).free
    if free < total_bytes:
        raise ConfigError(
            f"output {output}: {free:,} bytes are free, the checkpoint takes {total_bytes:,}; "
            "free some or give a folder on another disk"
        )


def write_beside_weights(source: ModelSource, folder: Path, texts: Mapping[str, str], *, output: Path) -> None:
    """Write what a model folder holds beside its weights: texts by file name, and what the original has (``CARRIED``).

    Raises:
        CheckpointError: a file cannot be written; ``output`` is named.
    """
    try:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for path in carried_files(source.folder):
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / path, folder / path)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written ({error})") from error


def expert_scope(format: CheckpointFormat, target: Target) -> ExpertScope:
    """Which experts of a checkpoint share a choice."""
    if format is CheckpointFormat.DENSE:
        return ExpertScope.ANY
    by_transformers = format is CheckpointFormat.COMPRESSED_TENSORS and target is Target.TRANSFORMERS
    return ExpertScope.MODEL if by_transformers else ExpertScope.BLOCK


def codes_of(module: str, quantized: CodeLoader, *, choice: Choice, shape: tuple[int, ...]) -> QuantizedWeight:
    """Load the codes of a module and check that the format can hold them without loss.

    Raises:
        CheckpointError: there are none, they are of another choice or shape, asymmetric, outside the range of
            their bits (packing would spill them into their neighbours), or a scale is not finite.
    """
    weight = quantized(module)
    if weight is None:
        raise CheckpointError(f"module {module}: has the choice {choice} but no codes; quantize it or leave it out")
    if weight.choice != choice:
        raise CheckpointError(f"module {module}: codes are {weight.choice} but the choice is {choice}")
    if tuple(weight.codes.shape) != tuple(shape) or weight.codes.dtype != torch.int8:
        raise CheckpointError(
            f"module {module}: codes are {weight.codes.dtype} {list(weight.codes.shape)}; "
            f"expected {torch.int8} {list(shape)}"
        )
    if weight.zero_points is not None:
        raise CheckpointError(f"module {module}: has zero points, which do not load again; use the symmetric grid")
    low, high = (int(bound) for bound in weight.codes.aminmax())
    if low < -(1 << (choice.bits - 1)) or high >= 1 << (choice.bits - 1):
        raise CheckpointError(f"module {module}: codes from {low} to {high} do not fit {choice.bits} bits")
    if not bool(torch.isfinite(weight.scales).all()):
        raise CheckpointError(f"module {module}: a scale is NaN or infinite; quantize the module again")
    return weight


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Contents of ``lrpq.json``.

    Raises:
        ConfigError: a value is not JSON, such as NaN, which no strict reader accepts.
    """
    try:
        return json.dumps(dict(manifest), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{MANIFEST}: {error}; expected text, finite numbers, lists and mappings") from error


def carried_files(folder: Path) -> list[Path]:
    """Files of the original, relative to its folder, that the checkpoint takes over unchanged."""
    found = {path.relative_to(folder) for pattern in CARRIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)
