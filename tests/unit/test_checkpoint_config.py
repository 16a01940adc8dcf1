"""The quantization configuration names exactly the quantized modules, whatever else the model holds."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from lrpq.checkpoint.compressed_tensors import quantization_config
from lrpq.checkpoint.describe import matrix_modules
from lrpq.checkpoint.patterns import natural_key
from lrpq.errors import ConfigError
from lrpq.model.layers import Choice, LinearSpec

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
LAYERS = [f"model.layers.{i}.{kind}" for i in range(24) for kind in KINDS]
PALETTE = [Choice(bits=b, group_size=g) for b in (2, 3, 4, 8) for g in (64, 128, -1)]
NEIGHBOURS = ["lm_head", "model.embed_tokens", "model.norm", "modelxlayersx1xself_attn.q_proj"]
NEIGHBOURS += [f"vision.{name}" for name in LAYERS[:10]] + [f"{name}.lora_A" for name in LAYERS[:10]]


def matches(config: dict[str, Any], name: str) -> list[tuple[int, int]]:
    """(bits, group size) of every group with a target that the loader's own matching finds for a name."""
    return [
        (group["weights"]["num_bits"], group["weights"]["group_size"] or -1)
        for group in config["config_groups"].values()
        for target in group["targets"]
        if match_name(name, target)
    ]


@given(st.dictionaries(st.sampled_from(LAYERS), st.sampled_from(PALETTE), min_size=1))
def test_every_module_matches_its_own_choice_and_nothing_else_matches(choices: dict[str, Choice]) -> None:
    config = quantization_config(choices, ignore=[n for n in [*LAYERS, "lm_head"] if n not in choices])
    for name in LAYERS:
        expected = [(choices[name].bits, choices[name].group_size)] if name in choices else []
        assert matches(config, name) == expected
    for name in NEIGHBOURS:
        assert matches(config, name) == []
    assert set(config["ignore"]) == {*LAYERS, "lm_head"} - set(choices)


@given(st.permutations(LAYERS))
def test_order_of_the_choices_does_not_change_the_text(order: list[str]) -> None:
    choices = {name: PALETTE[hash_free(name) % len(PALETTE)] for name in LAYERS}
    expected = json.dumps(quantization_config(choices, ignore=["lm_head"]))
    assert json.dumps(quantization_config({n: choices[n] for n in order}, ignore=["lm_head"])) == expected


def hash_free(name: str) -> int:
    """A number from a name, the same in every process."""
    return sum(name.encode())


def test_names_without_a_layer_number_and_experts_are_matched_exactly() -> None:
    names = ["head.proj", "model.layers.1.mlp.experts.11.w1", "model.layers.11.mlp.experts.1.w1"]
    choices = {name: Choice(bits=2 + i, group_size=32) for i, name in enumerate(names)}
    config = quantization_config(choices)
    assert [matches(config, name) for name in names] == [[(2, 32)], [(3, 32)], [(4, 32)]]
    assert matches(config, "headXproj") == []
    assert matches(config, "model.layers.1.mlp.experts.1.w1") == []


def test_patterns_of_a_70b_model_fit_the_cache_of_compiled_patterns() -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.{i}.part.{kind}" for i in range(80) for kind in kinds]
    choices = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    targets = [t for g in quantization_config(choices)["config_groups"].values() for t in g["targets"]]
    assert len(targets) <= len(kinds) * len(PALETTE) < re._MAXCACHE
    assert all(target.startswith("re:^") and target.endswith("$") for target in targets)


def test_the_library_reads_what_was_meant() -> None:
    choices = {LAYERS[0]: Choice(bits=3, group_size=64), LAYERS[1]: Choice(bits=8, group_size=-1)}
    parsed = QuantizationConfig.model_validate(quantization_config(choices, ignore=["lm_head"]))
    weights = {group.weights.num_bits: group.weights for group in parsed.config_groups.values()}
    assert (weights[3].strategy, weights[3].group_size, weights[3].symmetric) == ("group", 64, True)
    assert (weights[8].strategy, weights[8].group_size, weights[8].symmetric) == ("channel", None, True)
    assert parsed.format == "pack-quantized"
    assert parsed.ignore == ["lm_head"]


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="no module"):
        quantization_config({})
    with pytest.raises(ConfigError, match=r"layers\.0.*both quantized and ignored"):
        quantization_config({LAYERS[0]: PALETTE[0]}, ignore=[LAYERS[0]])
    with pytest.raises(ConfigError, match="16 bits"):
        quantization_config({LAYERS[0]: Choice(bits=16, group_size=64)})


def test_natural_order_counts_layers() -> None:
    assert sorted(["a.10.b", "a.2.b", "a.b", "a.2.a"], key=natural_key) == ["a.b", "a.2.a", "a.2.b", "a.10.b"]


def test_names_on_disk_are_in_the_pattern_of_the_module() -> None:
    """One pattern for both: the loader would warn of one that matches no module."""
    specs = [
        spec(f"model.language_model.layers.{i}.mlp.up_proj", f"language_model.model.layers.{i}.mlp.up_proj.weight")
        for i in range(3)
    ]
    config = quantization_config({s.name: Choice(bits=4, group_size=32) for s in specs[:2]}, specs=specs)
    (group,) = config["config_groups"].values()
    assert len(group["targets"]) == 1
    for i, expected in enumerate([[(4, 32)], [(4, 32)], []]):
        assert matches(config, f"model.language_model.layers.{i}.mlp.up_proj") == expected
        assert matches(config, f"language_model.model.layers.{i}.mlp.up_proj") == expected
    assert matches(config, "language_model.layers.0.mlp.up_proj") == []


def test_experts_are_described_by_their_block() -> None:
    specs = [
        spec(
            f"model.layers.{i}.mlp.experts.{e}.gate_up_proj",
            *(f"model.layers.{i}.block_sparse_moe.experts.{e}.{part}.weight" for part in ("w1", "w3")),
            routed=True,
        )
        for i in range(12)
        for e in range(5)
    ]
    choices = {s.name: Choice(bits=4 if ".11." in s.name else 8, group_size=32) for s in specs if ".10." not in s.name}
    config = quantization_config(choices, specs=specs)
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert len(targets) == 2
    assert all(target.startswith("re:") and "experts" in target for target in targets)  # what transformers looks for
    for layer, expected in ((0, [(8, 32)]), (9, [(8, 32)]), (10, []), (11, [(4, 32)])):
        for projection in ("w1", "w2", "w3", "gate_proj"):
            assert matches(config, f"model.layers.{layer}.block_sparse_moe.experts.4.{projection}") == expected
        assert matches(config, f"model.layers.{layer}.mlp.experts") == expected
        assert matches(config, f"model.layers.{layer}.block_sparse_moe.gate") == []


def spec(name: str, *tensors: str, routed: bool = False) -> LinearSpec:
    return LinearSpec(
        name=name,
        block=0,
        d_out=32,
        d_in=32,
        input_site="up",
        fused_group=name.rsplit(".", 2)[0],
        tensors=tensors,
        routed=routed,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_matrix_modules_are_the_projections_and_the_head(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=11,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        names = matrix_modules(LlamaForCausalLM(config))
    assert len(names) == 11 * 7 + 1
    assert names[0] == "lm_head"
    assert [n for n in names if n.endswith("q_proj")] == [f"model.layers.{i}.self_attn.q_proj" for i in range(11)]
