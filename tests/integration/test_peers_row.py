"""A row of ``benchmarks.peers`` from its request to its figures; in one process, since processes start slowly."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pipeline_case import write_model
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.peers import ours, ruler
from benchmarks.peers.exchange import DENSE, PACKED, Request, Result, read_result, serve, write_request, write_tokens
from benchmarks.peers.stored_bits import all_in_bits, check_levels, weights_of
from lrpq.compare.methods import METHODS
from lrpq.compare.terms import Terms
from lrpq.compare.workbench import Gathered, Quantized, Workbench
from lrpq.evaluate.divergence import VARIANT, summarize
from lrpq.model.layers import Choice
from lrpq.model.safetensors_source import ModelSource
from tasks.calibration.load import load_windows
from tasks.calibration.sources import parse_source


def written(folder: Path) -> tuple[Path, Path, Tensor]:
    """A model, a text, and windows of it."""
    model, text = write_model(folder / "llama", hidden=64, ffn=128), folder / "text.txt"
    text.write_text(" ".join(f"The {n} houses stand on hill {n * n} ." for n in range(900)), encoding="utf-8")
    windows = load_windows(
        parse_source(f"text:{text}"),
        AutoTokenizer.from_pretrained(model),
        num_windows=4,
        length=32,
        seed=0,
        placement="spread",
    ).tokens
    return model, text, windows


def made(peer: str, folder: Path, model: Path, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Result]:
    """The folder of a row at 4 bits and groups of 32, and its result."""
    output = folder / peer
    output.mkdir()
    write_tokens(folder / "tokens", windows)
    request = Request(
        peer=peer,
        model=str(model),
        tokens=str(folder / "tokens"),
        output=str(output),
        bits=4,
        group_size=32,
        device="cpu",
        seed=0,
    )
    write_request(request, output / "request.json")
    monkeypatch.setattr(sys, "argv", ["ours", str(output / "request.json")])
    serve(ours.make)
    return output, read_result(output)


def test_the_controls_row_is_what_compare_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bits from the stored bytes and scores of plain transformers, against the core's own sums."""
    model, text, windows = written(tmp_path)
    output, result = made("control", tmp_path, model, windows, monkeypatch)
    weights = weights_of(model, result.modules)
    assert all_in_bits(output / PACKED, weights) == 4 + 16 / 32
    check_levels(output / PACKED, output / DENSE, weights)
    with pytest.raises(ValueError, match="values in a row"):
        check_levels(output / PACKED, model, weights)
    assert result.peak_bytes > 50_000_000
    command = ["ruler", str(model), str(output / DENSE), "--text", str(text), "--windows", "4", "--length", "32"]
    monkeypatch.setattr(sys, "argv", command)
    capsys.readouterr()
    ruler.main()
    scored = json.loads(capsys.readouterr().out)

    bench = Workbench(ModelSource(model), windows, Terms(group_sizes=(32, -1), shards=4))
    choices = {spec.name: Choice(bits=4, group_size=32) for spec in bench.stream().specs}
    assert sorted(choices) == result.modules
    codes = bench.codes(choices, METHODS["control"].recipe, Gathered())
    found = summarize(bench.scores(windows, Quantized(codes=codes, vectors={}), original=bench)[VARIANT])
    assert scored["kl_nats_per_token"] == pytest.approx(found.kl_nats, rel=0.05)  # bfloat16 by other kernels
    assert scored["perplexity"] == pytest.approx(found.perplexity, rel=0.02)


def test_lrpqs_row_mixes_widths_within_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, windows = written(tmp_path)
    output, result = made("lrpq", tmp_path, model, windows, monkeypatch)
    weights = weights_of(model, result.modules)
    assert 4 < all_in_bits(output / PACKED, weights) <= 4 + 16 / 32
    check_levels(output / PACKED, output / DENSE, weights)
    each = {round(all_in_bits(output / PACKED, {name: weights[name]}), 3) for name in result.modules}
    assert len(each) > 1
