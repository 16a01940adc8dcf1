"""What the runtime that will serve a checkpoint can execute, as a limit on choices.

``transformers``: compressed-tensors packs 1 to 8 bits densely and decompresses before the matrix product,
so every width from 2 bits on runs, as long as the group size divides the row.

``vllm``: Marlin kernels (vLLM, ``marlin_utils.verify_marlin_supports_shape``): 4 or 8 bits, groups of 32,
64 or 128 columns or one a row, on every GPU d_out a multiple of 64 and d_in a multiple of 128 and of the
group size. Tensor parallelism cuts q, k, v, gate and up along d_out (column parallel), o and down along
d_in (row parallel). What vLLM checks for a fused layer is the *sum* of its shards' d_out; the rule here
asks the multiple of 64 of every shard. That implies the sum's; it costs nothing where heads are 64 or 128
wide; it stays right when a fused layer is loaded unfused; and it holds where k and v heads are copied
because there are fewer of them than GPUs (a GPU's real width is then a multiple of the d_out / N assumed
here). A fused layer with one refused member is refused as a whole, because vLLM runs the members under one
scheme: lrpq.allocate.problem sees to that.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from lrpq.errors import ConfigError
from lrpq.model.layers import Choice, LinearSpec

TRANSFORMERS_BITS = frozenset(range(2, 9))
MARLIN_BITS = frozenset({4, 8})
MARLIN_GROUP_SIZES = frozenset({-1, 32, 64, 128})
MARLIN_MULTIPLE_OUT = 64  # GPTQ_MARLIN_MIN_THREAD_N
MARLIN_MULTIPLE_IN = 128  # GPTQ_MARLIN_MIN_THREAD_K

COLUMN_PARALLEL_SITES = frozenset({"qkv", "gate_up", "up"})
ROW_PARALLEL_SITES = frozenset({"o", "down"})


class Target(enum.Enum):
    """The runtime a checkpoint is made for."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


def check_tensor_parallel(target: Target, tensor_parallel: int) -> None:
    """Refuse a tensor-parallel size that makes no sense for the target.

    Raises:
        ConfigError: below 1, or above 1 for a target that does not split layers.
    """
    if tensor_parallel < 1:
        raise ConfigError(f"--tensor-parallel {tensor_parallel}: expected a number of GPUs, 1 or more")
    if tensor_parallel > 1 and target is not Target.VLLM:
        raise ConfigError(f"--tensor-parallel {tensor_parallel} has no effect with --target {target.value}; use vllm")


def width_per_gpu(spec: LinearSpec, *, tensor_parallel: int) -> tuple[int, int] | None:
    """Return (d_out, d_in) of the part of a layer that one GPU holds; None if the layer cannot be cut evenly.

    Raises:
        ConfigError: the layer's input site is not known to be column or row parallel.
    """
    if tensor_parallel == 1:
        return spec.d_out, spec.d_in
    site = spec.input_site.rsplit(".", 1)[-1]  # experts are cut like a dense MLP
    if site in COLUMN_PARALLEL_SITES:
        cut, kept = spec.d_out, spec.d_in
    elif site in ROW_PARALLEL_SITES:
        cut, kept = spec.d_in, spec.d_out
    else:
        known = ", ".join(sorted(COLUMN_PARALLEL_SITES | ROW_PARALLEL_SITES))
        raise ConfigError(
            f"{spec.name}: how tensor parallelism cuts input site {spec.input_site!r} is not known "
            f"(known: {known}); use --tensor-parallel 1"
        )
    if cut % tensor_parallel:
        return None
    part = cut // tensor_parallel
    return (part, kept) if site in COLUMN_PARALLEL_SITES else (kept, part)


def refusal(spec: LinearSpec, choice: Choice, *, target: Target, tensor_parallel: int = 1) -> str | None:
    """Say why the target cannot run ``spec`` with ``choice``, or None if it can.

    Whatever stops every choice (the shape) is named before what stops only this one (bits, group size).

    Raises:
        ConfigError: the tensor-parallel size does not fit the target, or the layer's input site is unknown.
    """
    check_tensor_parallel(target, tensor_parallel)
    if target is Target.TRANSFORMERS:
        if choice.bits not in TRANSFORMERS_BITS:
            return f"compressed-tensors has no {choice.bits}-bit packing"
        return None if choice.fits(spec.d_in) else f"d_in {spec.d_in} is no multiple of {choice.group_size}"
    where = f" on each of {tensor_parallel} GPUs" if tensor_parallel > 1 else ""
    widths = width_per_gpu(spec, tensor_parallel=tensor_parallel)
    if widths is None:
        return f"{spec.d_out} x {spec.d_in} cannot be cut into {tensor_parallel} equal parts"
    d_out, d_in = widths
    if d_out % MARLIN_MULTIPLE_OUT:
        return f"d_out {d_out}{where} is no multiple of {MARLIN_MULTIPLE_OUT}"
    if d_in % MARLIN_MULTIPLE_IN:
        return f"d_in {d_in}{where} is no multiple of {MARLIN_MULTIPLE_IN}"
    if choice.bits not in MARLIN_BITS:
        return f"Marlin kernels have no {choice.bits}-bit weights"
    if choice.scale_bits != 16:
        return "Marlin kernels read scales of 16 bits"
    if choice.group_size not in MARLIN_GROUP_SIZES:
        return f"Marlin kernels have no groups of {choice.group_size}"
    return None if choice.fits(d_in) else f"d_in {d_in}{where} is no multiple of {choice.group_size}"


def allowed_choices(spec: LinearSpec, target: Target, tensor_parallel: int = 1) -> Callable[[Choice | None], bool]:
    """Return a filter that is true for the choices the target runs; 16 bits (None) runs everywhere."""
    check_tensor_parallel(target, tensor_parallel)

    def allowed(choice: Choice | None) -> bool:
        return choice is None or refusal(spec, choice, target=target, tensor_parallel=tensor_parallel) is None

    return allowed
