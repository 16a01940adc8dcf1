"""What scales are stored as where the model decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from tiny_models import write_tiny

from flows.config_file import load_config
from flows.run_config import RunConfig, read_configuration, stored_run
from flows.scales import stored_scale_bits
from lrpq.errors import ConfigError, ModelError
from lrpq.model.described import DescribedModel
from lrpq.model.source import open_source

EXACT = ("llama", "mistral", "qwen2", "qwen3", "phi3")
OTHERS = ("opt", "gpt2", "gpt-neox", "gemma2", "gemma3", "mixtral", "qwen3-moe")


def run(**candidates: Any) -> RunConfig:
    return RunConfig.model_validate({"model": "m", "candidates": candidates})


@pytest.mark.parametrize("name", [*EXACT, *OTHERS])
def test_float8_where_a_power_of_two_changes_no_digit_and_the_result_loads(tmp_path: Path, name: str) -> None:
    folder = write_tiny(tmp_path / "model", name)
    expected = 8 if name in EXACT else 16
    assert stored_scale_bits(run(), open_source(folder)) == expected
    if name != "gpt2":  # is planned as the OPT it is read as
        assert stored_scale_bits(run(), DescribedModel(folder)) == expected
    assert stored_scale_bits(run(scales="bfloat16"), open_source(folder)) == 16


def test_sixteen_bits_where_weights_are_float16_and_where_rows_have_one_scale(tmp_path: Path) -> None:
    half = open_source(write_llama(tmp_path / "half", dtype=torch.float16))
    assert stored_scale_bits(run(), half) == 16
    with pytest.raises(ModelError, match="stored in float16"):
        stored_scale_bits(run(scales="float8"), half)
    assert stored_scale_bits(run(group_sizes=[-1]), open_source(write_llama(tmp_path / "whole"))) == 16


@pytest.mark.parametrize("plan", [{"target": "vllm"}, {"format": "gptq"}])
def test_a_run_for_what_reads_wide_scales_has_them_and_one_with_float8_says_what_to_do(plan: dict[str, str]) -> None:
    asked: dict[str, Any] = {"run": {"model": "m"}, "plan": {"budget_bits": 4.5, **plan}, "output": "o"}
    assert load_config(None, asked).run.candidates.scales == "bfloat16"
    stored = load_config(None, {**asked, "plan": {"budget_bits": 4.5}})
    assert stored.run.candidates.scales == "auto"
    later = stored.model_copy(update={"plan": load_config(None, asked).plan})  # as `lrpq reallocate` has it
    later.check_scales(scale_bits=16)
    with pytest.raises(ConfigError, match=r"--(target|format).*this run's are float8.*compress with --scales bfloat16"):
        later.check_scales(scale_bits=8)


def test_a_run_stored_before_scales_could_be_narrow_had_wide_ones() -> None:
    stored = {"model": "m", "candidates": {"bits": [3, 4], "group_sizes": [64]}}
    assert stored_run(stored).candidates.scales == "bfloat16"
    assert stored_run({**stored, "candidates": {"scales": "auto"}}).candidates.scales == "auto"
    assert read_configuration(stored)["candidates"]["scales"] == "bfloat16"


def test_images_have_wide_scales_and_may_say_so() -> None:
    asked: dict[str, Any] = {"plan": {"budget_bits": 4.5}, "output": "o"}
    for scales in ("auto", "bfloat16"):
        run = {"model": "m", "images": {"source": "photos"}, "candidates": {"scales": scales}}
        assert load_config(None, {**asked, "run": run}).run.candidates.scales == scales
    run = {"model": "m", "images": {"source": "photos"}, "candidates": {"scales": "float8"}}
    with pytest.raises(ConfigError, match=r"--scales float8 with --images"):
        load_config(None, {**asked, "run": run})
