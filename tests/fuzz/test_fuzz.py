"""Every reader reads a mutated artefact or refuses it by name; and the harness sees what it is there to see.

Some hundreds a reader; ``python -m tests.fuzz.run`` runs as many as one likes. child.py says what a failure is.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.store.thrift import decode, encode

from . import parquet
from .broken import READERS as BROKEN
from .child import load_corpus, mutated
from .readers import READERS
from .run import ROOT, Fuzzer, open_fuzzer

CASES = 200
SHORT_TIMEOUT = 1.5
HANGING = "broken-hang"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory and files are watched through /proc")


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    with open_fuzzer() as opened:
        yield opened


@pytest.mark.parametrize("name", [reader.name for reader in READERS])
def test_a_mutated_artefact_is_read_or_refused_by_name(fuzzer: Fuzzer, name: str) -> None:
    result = fuzzer.run(name, first=0, cases=CASES)
    assert not result.failures, result.report()
    assert result.cases == CASES
    assert result.outcomes["refused"] > CASES // 5  # the mutations do reach what is read


# ---- the harness ---------------------------------------------------------------------------------

FAULTS = {
    "broken-error": "KeyError: 'x'",
    "broken-unnamed": "names no file",
    "broken-lines": "no printable line",
    "broken-segfault": "ended with status signal 11",
    "broken-exit": "ended with status 3",
    "broken-memory": "MiB: StoreError",
    "broken-swallowed": "asked for too much memory",
    "broken-write": "opened WORK/case/new",
    "broken-folder": "files were changed",
    "broken-outside": "opened WORK/outside/a.txt",
    "broken-canary": "what lies outside the folder was read",
    "broken-trust": "changed content was accepted",
}


@pytest.mark.parametrize(("name", "fault"), FAULTS.items())
def test_a_broken_reader_is_found_out_and_the_rest_goes_on(fuzzer: Fuzzer, name: str, fault: str) -> None:
    result = fuzzer.run(name, first=0, cases=8)
    assert result.cases == 8
    assert len(result.failures) >= 6  # a mutation may give the same bytes
    assert all(fault in text for _, text in result.failures), result.report()
    assert f"--reader {name} --first {result.failures[0][0]} --cases 1" in result.report()


def test_a_reader_that_hangs_is_killed(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzer, "timeout_seconds", SHORT_TIMEOUT)
    result = fuzzer.run(HANGING, first=0, cases=2)
    assert [text for _, text in result.failures] == [f"no answer within {SHORT_TIMEOUT:g} s"] * 2
    assert not fuzzer.run("broken-none", first=0, cases=20).failures


def test_every_broken_reader_is_tested() -> None:
    assert {reader.name for reader in BROKEN} == {*FAULTS, HANGING, "broken-none"}


def test_a_sound_reader_has_no_failures(fuzzer: Fuzzer) -> None:
    result = fuzzer.run("broken-none", first=0, cases=100)
    assert not result.failures
    assert result.outcomes["refused"] > 80


def test_the_command_repeats_a_case() -> None:
    command = [sys.executable, "-m", "tests.fuzz.run", "--reader", "broken-error", "--first", "3", "--cases", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "KeyError: 'x'" in done.stdout


@pytest.mark.parametrize("name", ["model-index", "store-tensors", "token-rows", "config-toml"])
def test_a_case_is_the_same_bytes_every_time(name: str, tmp_path: Path) -> None:
    reader = next(reader for reader in READERS if reader.name == name)
    one, other = (load_corpus(tmp_path / folder, reader) for folder in "ab")
    cases = [mutated(reader, one, seed) for seed in range(50)]
    assert cases == [mutated(reader, other, seed) for seed in range(50)]
    contents = {repr(files) for _, files in cases}
    assert len(contents) > 40


def test_footers_and_page_headers_are_written_as_they_were_read(tmp_path: Path) -> None:
    for reader in READERS:
        for files in load_corpus(tmp_path, reader) if "parquet" in reader.roles.values() else []:
            for raw in (files[name] for name in reader.roles):
                assert isinstance(raw, bytes)
                footer, start = parquet.read_footer(raw)
                assert parquet.with_footer(raw[:start], footer) == raw
                header, end = decode(raw, 4)  # the first page follows the magic number
                assert encode(header) == raw[4:end]
