"""Configuration: defaults, strictness, and one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.config import CompressConfig, EvaluationConfig, PlanConfig, evaluation_source
from flows.config_file import checked, fields_of, flag_of, load_config
from flows.presets import FAST
from flows.run_config import CalibrationConfig, CandidateConfig, RunConfig, default_run_id
from lrpq.errors import BudgetError, ConfigError

MINIMAL = '[run]\nmodel = "org/Model-1B"\n[plan]\nbudget_bits = 3.25\n'


def write(folder: Path, text: str, name: str = "lrpq.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def message(path: Path | None, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, {"output": "out"} | (overrides or {}))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), {"output": str(tmp_path / "out")})
    assert config.run.calibration == CalibrationConfig(
        source="hub:Salesforce/wikitext:wikitext-2-raw-v1:train", num_windows=128, length=2048, text_column=None
    )
    assert config.run.candidates == CandidateConfig(bits=(2, 3, 4, 5, 6, 8), group_sizes=(64, -1), damping=0.01)
    assert (config.run.relevance, config.run.relevance_floor, config.run.seed) == ("blend", 0.03, 0)
    assert (config.run.dtype, config.run.shards, config.run.micro_batch, config.run.threads) == ("auto", None, None, 1)
    assert (config.plan.solver, config.plan.refine, config.plan.correction) == ("exact", "sequential", 0.5)
    assert (config.evaluation.num_windows, config.evaluation.length, config.evaluation.control) == (32, 512, True)
    assert config.evaluation.source == "hub:Salesforce/wikitext:wikitext-2-raw-v1:test"


def test_every_field_says_what_it_is() -> None:
    for path, field in fields_of(CompressConfig):
        if path not in {
            ("run",),
            ("plan",),
            ("evaluation",),
            ("cluster",),
            ("run", "calibration"),
            ("run", "images"),
            ("run", "candidates"),
        }:
            assert field.description, path


def test_no_two_fields_share_an_option() -> None:
    flags = [flag.name for _, field in fields_of(CompressConfig) if (flag := flag_of(field)) is not None]
    assert len(flags) == len(set(flags)) > 25


def test_options_override_the_file_and_leave_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + 'keep = ["*.0.*=8"]\n')
    config = load_config(path, {"output": "o", "run": {"seed": 7}, "plan": {"budget_bytes": "1.5GB"}})
    assert config.run.seed == 7
    assert config.run.model == "org/Model-1B"
    assert config.plan.keep == ("*.0.*=8",)
    assert config.plan.budget_bits is None
    assert config.plan.budget_bytes == 1_500_000_000


def test_json_and_toml_give_the_same(tmp_path: Path) -> None:
    settings = {"run": {"model": "org/Model-1B"}, "plan": {"budget_bits": 3.25}}
    as_json = write(tmp_path, json.dumps(settings), "lrpq.json")
    as_toml = write(tmp_path, MINIMAL)
    assert load_config(as_json, {"output": "o"}) == load_config(as_toml, {"output": "o"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[run.calibration]\nnum_window = 3", "'num_window' in [run.calibration]; did you mean 'num_windows'?"),
        ("[plan]\nbudget = 3.0", "'budget' in [plan]; did you mean 'budget_bits'?"),
        ("[plam]\nbudget_bits = 3.0", "'plam' above all sections; did you mean 'plan'?"),
        ("sede = 1", "'sede' above all sections; did you mean 'seed' in [run]?"),
        ("[cluster]\nseed = 1", "'seed' in [cluster]; 'seed' belongs in [run]"),
        ("num_windows = 1", "'num_windows' belongs in [run.calibration] or in [evaluation]"),
        ("[calibration]\nlength = 3", "'calibration' belongs in [run]"),
        ("[cluster]\nzzzzzzzz = 1", "'zzzzzzzz' in [cluster]; known there: workers, device, address"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    found = message(path, {"run": {"model": "m"}})
    assert found.startswith(f"{path}: unknown key ")
    assert expected in found


@pytest.mark.parametrize(
    ("section", "value", "expected"),
    [
        ({"run": {"seed": "3"}}, "text for a number", '--seed: expected an integer, got "3"'),
        ({"run": {"seed": True}}, "truth for a number", "--seed: expected an integer, got true"),
        ({"run": {"seed": -1}}, "negative", "--seed: expected greater than or equal to 0, got -1"),
        ({"run": {"relevance": "lpr"}}, "no choice", "--relevance: expected 'fisher', 'lrp', 'cp-lrp' or 'blend', got"),
        ({"run": {"candidates": {"bits": [3, 7]}}}, "no width", "--bits: 7 is not one of 2, 3, 4, 5, 6, 8"),
        ({"run": {"candidates": {"group_sizes": [48]}}}, "no group", "--group-size: 48 is not one of 32, 64, 128, -1"),
        (
            {"run": {"candidates": {"damping": 0}}},
            "no damping",
            "run.candidates.damping: expected greater than 0, got 0",
        ),
        ({"run": "text"}, "no section", "run: expected an object"),
        ({"cluster": {"workers": 0}}, "no worker", "--workers: expected greater than or equal to 1, got 0"),
        ({"run_id": "../x"}, "path as a run id", "run id '../x': expected up to 64 of a-z 0-9"),
        ({"run_id": "a" * 65}, "long run id", "expected up to 64"),
    ],
)
def test_wrong_value_names_field_and_what_is_expected(section: dict[str, Any], value: str, expected: str) -> None:
    base: dict[str, Any] = {"run": {"model": "m"}, "plan": {"budget_bits": 3.25}}
    merged = base | {k: base.get(k, {}) | v if isinstance(v, dict) else v for k, v in section.items()}
    assert expected in message(None, merged), value


def test_wrong_value_in_a_file_names_the_file_and_the_field(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("[plan]", 'seed = "x"\n[plan]'))
    assert message(path) == f'{path}: run.seed: expected an integer, got "x"'


@pytest.mark.parametrize(
    ("plan", "kind", "expected"),
    [
        ({}, ConfigError, "no budget"),
        ({"budget_bits": 3.0, "budget_bytes": 10**9}, ConfigError, "two budgets"),
        ({"budget_bits": 16.5}, BudgetError, "above 16"),
        ({"budget_bits": 0.0}, BudgetError, "positive"),
        ({"budget_bits": float("nan")}, ConfigError, "--budget: expected a finite number"),
        ({"budget_bits": 1.9}, BudgetError, "smallest possible is 2 bits"),
        ({"budget_bytes": 0}, BudgetError, "positive"),
        ({"budget_bytes": "40 XB"}, ConfigError, "40GB"),
        ({"budget_bits": 3.0, "keep": ["model.layers.0"]}, ConfigError, "PATTERN=BITS"),
        ({"budget_bits": 3.0, "keep": ["*.0.*=7"]}, ConfigError, "7 bits are not among the choices"),
        ({"budget_bits": 3.0, "tensor_parallel": 2}, ConfigError, "--tensor-parallel 2 has no effect"),
    ],
)
def test_impossible_plans_are_refused(plan: dict[str, Any], kind: type[ConfigError], expected: str) -> None:
    with pytest.raises(kind) as caught:
        load_config(None, {"run": {"model": "m"}, "plan": plan, "output": "o"})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("group_sizes", "scales", "budget", "possible"),
    [
        ([64], "bfloat16", 2.25, True),
        ([64], "bfloat16", 2.2499, False),
        ([64], "float8", 2.125, True),
        ([64], "float8", 2.1249, False),
        ([64], "auto", 2.125, True),  # the model decides; where it has wide scales, the allocation refuses
        ([64], "auto", 2.1249, False),
        ([128], "bfloat16", 2.125, True),
        ([32, 128], "bfloat16", 2.125, True),
        ([-1], "bfloat16", 2.0, True),
    ],
)
def test_the_smallest_budget_is_exact(group_sizes: list[int], scales: str, budget: float, possible: bool) -> None:
    overrides = {
        "run": {"model": "m", "candidates": {"group_sizes": group_sizes, "scales": scales}},
        "plan": {"budget_bits": budget},
        "output": "o",
    }
    if possible:
        assert load_config(None, overrides).plan.budget_bits == budget
    else:
        with pytest.raises(BudgetError):
            load_config(None, overrides)


def test_missing_model_and_output_say_how_to_give_them() -> None:
    with pytest.raises(ConfigError, match=r"^run\.model is missing; give MODEL or set it in a config file"):
        load_config(None, {"plan": {"budget_bits": 3.0}, "output": "o"})
    with pytest.raises(ConfigError, match=r"^output is missing; give --output"):
        load_config(None, {"plan": {"budget_bits": 3.0}, "run": {"model": "m"}})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.toml", "[run\n", "not valid TOML"),
        ("a.toml", "x = 1\nx = 2\n", "at line 2"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"run": {}, "run": {}}', "twice"),
        ("a.json", "[]", "expected an object"),
        ("a.yaml", "run: 1", "ends in .toml or .json"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, text: str, expected: str) -> None:
    path = write(tmp_path, text, name)
    found = message(path)
    assert str(path) in found
    assert expected in found


def test_file_that_is_not_there_or_not_utf8(tmp_path: Path) -> None:
    assert "No such file" in message(tmp_path / "none.toml")
    path = tmp_path / "latin.toml"
    path.write_bytes(b'store = "\xe9"')
    assert "not valid TOML" in message(path)


def test_run_id_depends_on_the_configuration_but_not_on_the_budget(tmp_path: Path) -> None:
    run = RunConfig(model="HuggingFaceTB/SmolLM2-135M")
    assert default_run_id(run).startswith("smollm2-135m-")
    assert len(default_run_id(run)) == len("smollm2-135m-") + 8
    others = [
        RunConfig(model="other/SmolLM2-135M"),
        RunConfig(model=run.model, seed=1),
        RunConfig(model=run.model, threads=2),
        RunConfig(model=run.model, candidates=CandidateConfig(bits=(2, 3))),
        RunConfig(model=run.model, calibration=CalibrationConfig(length=512)),
    ]
    assert len({default_run_id(r) for r in [run, *others]}) == len(others) + 1
    assert default_run_id(RunConfig.model_validate_json(run.model_dump_json())) == default_run_id(run)


def test_the_order_of_choices_makes_no_other_run() -> None:
    one = RunConfig(model="m", candidates=CandidateConfig(bits=(4, 2, 4), group_sizes=(128, 32)))
    two = RunConfig(model="m", candidates=CandidateConfig(bits=(2, 4), group_sizes=(32, 128)))
    assert default_run_id(one) == default_run_id(two)


@pytest.mark.parametrize("model", ["/", "...", "Ünïcode", "a" * 300, "x/" * 9])
def test_default_run_ids_are_valid_for_any_name(model: str) -> None:
    run_id = default_run_id(RunConfig(model=model))
    config = load_config(None, {"run": {"model": model}, "plan": {"budget_bits": 3.0}, "output": "o", "run_id": run_id})
    assert config.run_id == run_id


def test_stored_configuration_reads_back_as_plain_json() -> None:
    run = RunConfig(model="m", candidates=CandidateConfig(bits=(3, 4)))
    assert RunConfig.model_validate(json.loads(run.model_dump_json())) == run


def test_a_model_folder_means_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner" / "model").mkdir(parents=True)
    settings = {"plan": {"budget_bits": 3.0}, "output": "o"}
    monkeypatch.chdir(tmp_path)
    one = load_config(None, settings | {"run": {"model": "inner/model"}})
    monkeypatch.chdir(tmp_path / "inner")
    two = load_config(None, settings | {"run": {"model": "./model/"}})
    assert default_run_id(one.run) == default_run_id(two.run)
    assert two.output == tmp_path / "inner" / "o"


def test_store_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"run": {"model": "m"}, "plan": {"budget_bits": 3.0}, "output": "o"}
    monkeypatch.setenv("LRPQ_STORE", "s3://bucket/prefix")
    assert load_config(None, settings).store == "s3://bucket/prefix"
    monkeypatch.delenv("LRPQ_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert load_config(None, settings).store == "/somewhere/lrpq/store"


def test_text_to_measure_on() -> None:
    default = EvaluationConfig()
    assert evaluation_source(default, calibration="pydoc:calibrate") == "pydoc:evaluate"
    assert evaluation_source(EvaluationConfig(source="text:a"), calibration="pydoc:calibrate") == "text:a"
    assert evaluation_source(EvaluationConfig(enabled=False), calibration="text:b") is None
    with pytest.raises(ConfigError, match="--evaluation SOURCE"):
        evaluation_source(default, calibration="text:b")


def test_sections_alone_are_checked_too() -> None:
    given = {"budget_bits": 3.0, "solver": "best"}
    with pytest.raises(ConfigError, match=r"--solver: expected 'exact' or 'lagrangian'"):
        checked(PlanConfig, given, options=given, section=("plan",))


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig(model="m").seed = 3  # type: ignore[misc]


def test_fast_is_short_for_options_that_can_be_given() -> None:
    from flows.commands.options import nested, presets

    nothing: dict[str, Any] = {**dict.fromkeys(FAST), "run.seed": None}
    assert presets(nothing, fast=False) == nothing
    assert presets(nothing, fast=True) == {**FAST, "run.seed": None}
    assert presets({**nothing, "plan.refine": "sequential"}, fast=True)["plan.refine"] == "sequential"
    given = {"output": "o", "run.model": "m", "plan.budget_bits": 3.25}
    config = load_config(None, nested({**given, **FAST}))
    assert (config.run.relevance, config.run.gradients_every, config.plan.refine) == ("fisher", 8, "stitch")
    assert default_run_id(config.run) != default_run_id(RunConfig(model="m", relevance="fisher"))


@pytest.mark.parametrize("relevance", ["blend", "lrp", "cp-lrp"])
def test_token_weights_need_gradients_of_all_windows(relevance: str) -> None:
    with pytest.raises(ConfigError, match=rf"--gradients-every 2 with --relevance {relevance}"):
        load_config(
            None,
            {
                "output": "o",
                "run": {"model": "m", "gradients_every": 2, "relevance": relevance},
                "plan": {"budget_bits": 3.0},
            },
        )
