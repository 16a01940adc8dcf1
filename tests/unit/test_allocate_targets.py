"""What runtimes run."""

from __future__ import annotations

import pytest

from lrpq.allocate.targets import Target, allowed_choices, refusal, width_per_gpu
from lrpq.errors import ConfigError
from lrpq.model.layers import Choice, LinearSpec


def spec(d_out: int, d_in: int, site: str = "qkv") -> LinearSpec:
    return LinearSpec(name="a.q_proj", block=0, d_out=d_out, d_in=d_in, input_site=site, fused_group="a")


def every_choice() -> list[Choice]:
    return [Choice(bits=bits, group_size=size) for bits in range(1, 10) for size in (-1, 16, 32, 64, 128, 256)]


def test_transformers_runs_2_to_8_bits_in_groups_that_divide_the_row() -> None:
    allowed = allowed_choices(spec(10, 192), Target.TRANSFORMERS)
    assert {choice for choice in every_choice() if allowed(choice)} == {
        Choice(bits=bits, group_size=size) for bits in range(2, 9) for size in (-1, 16, 32, 64)
    }
    assert allowed(None)


def test_vllm_runs_what_marlin_runs() -> None:
    allowed = allowed_choices(spec(64, 256), Target.VLLM)
    assert {choice for choice in every_choice() if allowed(choice)} == {
        Choice(bits=bits, group_size=size) for bits in (4, 8) for size in (-1, 32, 64, 128)
    }
    for shape in ((96, 256), (64, 192), (32, 256), (64, 64)):
        refused = allowed_choices(spec(*shape), Target.VLLM)
        assert not any(refused(choice) for choice in every_choice())
        assert refused(None)


@pytest.mark.parametrize(
    ("site", "d_out", "d_in", "gpus", "runs"),
    [
        ("qkv", 1024, 8192, 8, True),  # Llama-3-70B's k_proj: 128 rows a GPU
        ("qkv", 1024, 8192, 16, True),  # 64; really 128, because 8 heads are copied
        ("qkv", 1024, 8192, 32, False),
        ("gate_up", 28672, 8192, 8, True),
        ("gate_up", 14336, 4096, 256, False),
        ("o", 8192, 8192, 8, True),  # 1024 columns
        ("o", 4096, 4096, 64, False),  # 64 columns
        ("down", 4096, 14336, 8, True),  # 1792 = 14 * 128
        ("down", 4096, 14336, 32, False),  # 448
        ("down", 4096, 14336, 3, False),  # not whole
        ("down", 64, 14336, 8, True),  # its rows are not cut
        ("qkv", 512, 128, 8, True),  # its columns are not cut
    ],
)
def test_tensor_parallel_cuts_the_right_side(site: str, d_out: int, d_in: int, gpus: int, runs: bool) -> None:
    found = refusal(spec(d_out, d_in, site), Choice(bits=4, group_size=128), target=Target.VLLM, tensor_parallel=gpus)
    assert (found is None) == runs


def test_groups_must_divide_the_part_a_gpu_holds() -> None:
    # 1152 columns on 3 GPUs: 384 = 3 * 128
    module = spec(64, 1152, "down")
    assert width_per_gpu(module, tensor_parallel=3) == (64, 384)
    for size in (-1, 32, 64, 128):
        choice = Choice(bits=8, group_size=size)
        assert refusal(module, choice, target=Target.VLLM, tensor_parallel=3) is None
    assert width_per_gpu(module, tensor_parallel=5) is None


def test_reasons() -> None:
    def why(module: LinearSpec, bits: int, size: int, gpus: int = 1) -> str | None:
        return refusal(module, Choice(bits=bits, group_size=size), target=Target.VLLM, tensor_parallel=gpus)

    assert why(spec(64, 128), 3, 64) == "Marlin kernels have no 3-bit weights"
    assert why(spec(64, 128), 4, 16) == "Marlin kernels have no groups of 16"
    assert why(spec(64, 100), 3, 16) == "d_in 100 is no multiple of 128"
    assert why(spec(64, 128), 4, 64, 2) == "d_out 32 on each of 2 GPUs is no multiple of 64"
    assert why(spec(65, 128), 4, 64, 2) == "65 x 128 cannot be cut into 2 equal parts"
    assert refusal(spec(1, 64), Choice(bits=9, group_size=64), target=Target.TRANSFORMERS) == (
        "compressed-tensors has no 9-bit packing"
    )


def test_refused_arguments() -> None:
    choice = Choice(bits=4, group_size=128)
    with pytest.raises(ConfigError, match="1 or more"):
        refusal(spec(64, 128), choice, target=Target.VLLM, tensor_parallel=0)
    with pytest.raises(ConfigError, match="no effect"):
        allowed_choices(spec(64, 128), Target.TRANSFORMERS, 2)
    with pytest.raises(ConfigError, match="input site 'router'"):
        refusal(spec(64, 128, "router"), choice, target=Target.VLLM, tensor_parallel=2)
    assert refusal(spec(64, 128, "router"), choice, target=Target.VLLM) is None
