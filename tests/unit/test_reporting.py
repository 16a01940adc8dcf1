"""What a person or a program sees: progress, the closing table, errors in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress as Bars

from flows.boundary import Interrupted, describe, redacted, resumable, user_error
from flows.closing import NOTHING_COMPUTED, computed_nothing, print_closing, print_evaluation, shown_bytes
from flows.progress import JsonlProgress, PlainProgress, RichProgress, shown_seconds
from lrpq.errors import ConfigError, ModelError


class Clock:
    """Time that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def console() -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=False)


def text_of(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def module(name: str, *, bits: int, num_weights: int, storage_bits: int) -> dict[str, Any]:
    sizes = {"bits": bits, "num_weights": num_weights, "storage_bits": storage_bits}
    return {"name": name, "kind": name.rsplit(".", 1)[-1], "block": 0, "group_size": 64, "cost_nats": 0.1, **sizes}


MANIFEST: dict[str, Any] = {
    "run_id": "m-1",
    "model": "org/m",
    "budget": {
        "asked_bits": 3.25,
        "asked_bytes": None,
        "reached_bits": 3.2499,
        "reached_bytes": 1_500_000,
        "bound_nats": 0.01,
        "gap": 0.001,
    },
    "bytes": {"original": 4_000_000, "compressed": 1_500_000},
    "modules": [
        module("a.0.q_proj", bits=3, num_weights=100, storage_bits=325),
        module("a.1.q_proj", bits=4, num_weights=300, storage_bits=1275),
        module("a.0.o_proj", bits=4, num_weights=100, storage_bits=425),
    ],
    "kept_16bit": ["a.1.o_proj"],
    "evaluation": {
        "reference": {"perplexity": 26.24},
        "lrpq": {"perplexity": 30.5, "kl_nats": 0.17, "kl_standard_error": 0.004, "top1": 0.83},
        "control": {
            "perplexity": 41.0,
            "kl_nats": 0.627,
            "kl_standard_error": None,
            "top1": 0.7,
            "label": "uniform GPTQ 3b/g64",
            "all_in_bits": 3.25,
        },
    },
    "seconds": {"profile": 20.0, "refine": 70.5, "assemble": 1.0},
    "reused": ["profile"],
    "degraded": {"not_positive_definite": 2, "dead_inputs": 0, "rows": 777},
    "warnings": ["texts overlap"],
}


def test_closing_table_adds_up() -> None:
    target = console()
    print_closing(MANIFEST, target)
    lines = text_of(target).splitlines()
    cells = {line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]] for line in lines if "│" in line}
    assert cells["q_proj"] == ["1", "1", "", f"{1600 / 400:.3f}"]
    assert cells["o_proj"] == ["", "1", "1", f"{425 / 100:.3f}"]
    assert cells["perplexity"] == ["26.240", "41.000", "30.500"]
    assert cells["KL (nats a token)"] == ["", "0.6270", "0.1700 +- 0.0040"]
    assert cells["bytes"] == ["4.00 MB", "", "1.50 MB"]
    assert cells["profile"] == ["20.0", "reused"]
    text = text_of(target)
    assert "uniform GPTQ 3b/g64" in text
    assert "budget 3.25 bits a weight, reached 3.2499 bits" in text
    assert "degraded: 2 Hessians" in text
    assert "777" not in text
    assert "warning: texts overlap" in text
    assert NOTHING_COMPUTED not in text


def test_what_was_expected_stands_beside_what_came_of_it() -> None:
    expected = {
        "source": "text:t",
        "windows": 16,
        "length": 512,
        "candidates": {"kl_nats": 0.25},
        "factor": 0.5,
        "kl_nats": 0.125,
        "range_nats": [0.1, 0.15],
    }
    target = console()
    print_closing(MANIFEST | {"forecast": expected}, target)
    text = " ".join(text_of(target).split())
    assert "forecast before refinement: KL 0.125 nats a token, going by other models 0.100 to 0.150" in text
    assert "(0.5 times the candidates' 0.2500 on 16 x 512 tokens of text:t)" in text
    assert "not what was written" not in text
    target = console()
    print_closing(MANIFEST | {"forecast": expected | {"written": False}}, target)
    assert "of lrpq's plan, which is not what was written" in " ".join(text_of(target).split())


def test_second_run_says_that_nothing_was_computed() -> None:
    again = MANIFEST | {"reused": ["profile", "refine"]}
    target = console()
    print_closing(again, target)
    assert NOTHING_COMPUTED in text_of(target)
    assert not computed_nothing(MANIFEST)
    assert not computed_nothing({"seconds": {}})
    assert not computed_nothing(again | {"computed_nothing": False})


def test_closing_of_a_run_without_evaluation() -> None:
    target = console()
    print_closing({k: v for k, v in MANIFEST.items() if k != "evaluation"}, target)
    assert "1.50 MB" in text_of(target)
    assert "KL" not in text_of(target)


def test_evaluation_of_a_checkpoint() -> None:
    target = console()
    print_evaluation({"reference": {"perplexity": 20.0}, "checkpoint": {"perplexity": 21.0, "kl_nats": 0.05}}, target)
    assert "21.000" in text_of(target)


def test_names_with_brackets_are_not_markup() -> None:
    target = console()
    print_closing(MANIFEST | {"model": "[bold]m[/bold]", "warnings": ["[red]"]}, target)
    assert "[bold]m[/bold]" in text_of(target)
    assert "warning: [red]" in text_of(target)


@pytest.mark.parametrize(
    ("number", "expected"), [(0, "0 B"), (999, "999 B"), (40_200_000_000, "40.20 GB"), (2.5e12, "2.50 TB")]
)
def test_bytes_are_powers_of_1000(number: float, expected: str) -> None:
    assert shown_bytes(number) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_seconds_are_readable(seconds: float, expected: str) -> None:
    assert shown_seconds(seconds) == expected


def test_plain_lines_are_few_and_say_what_is_left() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = PlainProgress(stream, clock=clock)
    progress.stage("candidates", 30)
    for block in range(30):
        clock.now += 4.0
        progress.advance("candidates", f"block {block}")
    progress.done("candidates", seconds=120.0, reused=False)
    progress.done("profile", seconds=0.0, reused=True)
    progress.note("short text")
    progress.tell("forecast: 0.1")
    *lines, last = stream.getvalue().splitlines()
    assert last == "forecast: 0.1"
    assert lines[0] == "candidates: 30 blocks"
    assert lines[1] == "candidates: 3/30, block 2, 1 min 48 s left"
    assert lines[-3:] == ["candidates: 30 blocks in 2 min 00 s", "profile: found in the store", "warning: short text"]
    assert len(lines) == 4 + 120 // 12 - 1


def test_json_lines_hold_the_same_facts() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = JsonlProgress(stream, clock=clock)
    progress.stage("refine", 2)
    clock.now += 5
    progress.advance("refine", "block 0")
    progress.done("refine", seconds=10.0, reused=False)
    progress.tell("forecast: 0.1")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["stage", "advance", "done", "told"]
    assert events[3] == {"event": "told", "text": "forecast: 0.1"}
    assert events[1] == {
        "event": "advance", "name": "refine", "done": 1, "total": 2, "detail": "block 0", "seconds_left": 5.0
    }  # fmt: skip


def test_bars_show_the_time_left_of_slow_blocks() -> None:
    clock = Clock()
    target = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    bars = Bars(*RichProgress.columns(), console=target, auto_refresh=False)
    progress = RichProgress(bars, clock=clock)
    with bars:
        progress.stage("profile", 61)
        clock.now += 600  # far beyond the window over which Rich estimates speed
        progress.advance("profile", "backward, block 29 [x]")
        bars.refresh()
        progress.done("profile", seconds=600.0, reused=False)
        progress.done("candidates", seconds=0.0, reused=True)
        progress.tell("forecast: [x]")
    text = text_of(target)
    assert "forecast: [x]" in text
    assert "1/61 blocks" in text
    assert "10 h 00 min left" in text
    assert "block 29 [x]" in text
    assert "profile: 61 blocks in 10 min 00 s" in text
    assert "candidates: found in the store" in text


def test_errors_are_found_behind_what_wraps_them() -> None:
    origin = ModelError("shard a.safetensors: truncated")
    wrapped = RuntimeError("flow failed")
    wrapped.__cause__ = origin
    assert user_error(wrapped) is origin
    assert user_error(RuntimeError("x")) is None
    failure = describe(wrapped, argv=[])
    assert (failure.kind, failure.message, failure.exit_code) == ("ModelError", str(origin), 2)


def test_errors_of_ray_workers_lose_their_traceback() -> None:
    exceptions = pytest.importorskip("ray.exceptions")
    origin = ModelError("tensor x: holds NaN")
    as_raised = exceptions.RayTaskError("task", "Traceback (most recent call last):\n  ...", origin)
    for error in (as_raised, as_raised.as_instanceof_cause()):
        assert describe(error, argv=[]).message == "tensor x: holds NaN"
        assert describe(error, argv=[]).exit_code == 2


def test_a_circle_of_causes_ends() -> None:
    one, two = RuntimeError("1"), RuntimeError("2")
    one.__cause__, two.__cause__ = two, one
    assert user_error(one) is None


def test_a_message_is_one_line() -> None:
    assert describe(ConfigError("a\nb\t c"), argv=[]).message == "a b c"


def test_unexpected_errors_leave_their_traceback_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MY_API_KEY", "verysecretvalue")
    try:
        raise KeyError("verysecretvalue of http://me:pw@host/x")
    except KeyError as error:
        failure = describe(error, argv=["compress", "m"])
    (log,) = (tmp_path / "lrpq" / "logs").iterdir()
    assert failure.exit_code == 1
    assert str(log) in failure.message
    written = log.read_text()
    assert "Traceback" in written
    assert "lrpq compress m" in written
    assert log.stat().st_mode & 0o077 == 0
    for text in (written, failure.message):
        assert "verysecretvalue" not in text
        assert "pw@" not in text


def test_a_traceback_that_cannot_be_written_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lrpq").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failure = describe(ValueError("x"), argv=[])
    assert "could not be written" in failure.message
    assert failure.exit_code == 1


def test_secrets_are_left_out() -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": "abcdefgh1234", "HOME": "/root/abc", "TOKENIZERS_PARALLELISM": "false"}
    text = "s3://k:s@host/b?X-Amz-Signature=0f0f&a=1 abcdefgh1234 /root/abc false"
    assert redacted(text, environment) == "s3://***@host/b?X-Amz-Signature=***&a=1 *** /root/abc false"


def test_interruption_says_how_to_continue() -> None:
    with pytest.raises(Interrupted) as caught:
        with resumable("m-12345678"):
            raise KeyboardInterrupt
    command = ["compress", "my model", "--budget", "3"]
    failure = describe(caught.value, argv=command)
    assert failure.exit_code == 130
    assert "`lrpq compress 'my model' --budget 3 --run-id m-12345678`" in failure.message
    again = describe(caught.value, argv=[*command, "--run-id=m-12345678"])
    assert again.message.count("--run-id") == 1


def test_interruption_is_found_behind_what_wraps_it() -> None:
    with pytest.raises(Interrupted):
        with resumable():
            raise RuntimeError("crashed") from KeyboardInterrupt()
    with pytest.raises(ConfigError):
        with resumable():
            raise ConfigError("x")
