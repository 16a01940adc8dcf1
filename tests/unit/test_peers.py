"""``benchmarks.peers`` without the peers: what is counted, exchanged, scored and reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_llama
from safetensors.torch import load_file, save_file
from tiny_models import write_tokenizer
from transformers import AutoTokenizer

from benchmarks.peers import __main__ as peers
from benchmarks.peers.datasets_types import NAMES, with_datasets_types
from benchmarks.peers.environments import Interpreter
from benchmarks.peers.exchange import (
    Request,
    last_line,
    read_request,
    read_tokens,
    write_dense,
    write_request,
    write_tokens,
)
from benchmarks.peers.rows import LOG, PeerError, Row, run_peer
from benchmarks.peers.ruler import windows_of
from benchmarks.peers.scoring import Ruler, RulerError
from benchmarks.peers.stored_bits import all_in_bits, check_levels, weights_of
from benchmarks.peers.table import line, table

ROWS, COLUMNS, GROUP = 32, 128, 64
MODULE = "model.layers.0.mlp.up_proj"


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file({f"{MODULE}.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_groups_cost_one_scale_a_group(tmp_path: Path, bits: int) -> None:
    tensors = {
        "weight_packed": zeros(ROWS, COLUMNS * bits // 32),
        "weight_scale": zeros(ROWS, COLUMNS // GROUP, dtype=torch.bfloat16),
        "weight_shape": zeros(2, dtype=torch.int64),
        "bias": zeros(ROWS, dtype=torch.bfloat16),
    }
    packed = stored(tmp_path / "packed", tensors)
    assert all_in_bits(packed, {MODULE: ROWS * COLUMNS}) == bits + 16 / GROUP


def test_zero_points_and_group_indices_count(tmp_path: Path) -> None:
    """GPTQ's layout, by hand: 3 bits of code, 19 bits a group, and 32 bits a column over all rows."""
    tensors = {
        "qweight": zeros(COLUMNS * 3 // 32, ROWS),
        "qzeros": zeros(COLUMNS // GROUP, ROWS * 3 // 32),
        "scales": zeros(COLUMNS // GROUP, ROWS, dtype=torch.float16),
        "g_idx": zeros(COLUMNS),
    }
    packed = stored(tmp_path / "packed", tensors)
    assert all_in_bits(packed, {MODULE: ROWS * COLUMNS}) == 3 + 19 / GROUP + 32 / ROWS


def test_what_is_stored_otherwise_is_no_zero(tmp_path: Path) -> None:
    codes = {"weight_packed": zeros(ROWS, COLUMNS // 8)}
    unknown = stored(tmp_path / "unknown", {**codes, "weight_table": zeros(16)})
    with pytest.raises(ValueError, match=r"weight_table: .* not counted"):
        all_in_bits(unknown, {MODULE: ROWS * COLUMNS})
    packed = stored(tmp_path / "packed", codes)
    with pytest.raises(ValueError, match="down_proj: no codes"):
        all_in_bits(packed, {MODULE: ROWS * COLUMNS, "down_proj": 1})


def test_what_is_scored_has_no_more_levels_than_are_stored(tmp_path: Path) -> None:
    bits, groups = 2, COLUMNS // GROUP
    tensors = {
        "weight_packed": zeros(ROWS, COLUMNS * bits // 32),
        "weight_scale": zeros(ROWS, groups, dtype=torch.bfloat16),
    }
    packed = stored(tmp_path / "packed", tensors)
    levels = torch.arange(2**bits * groups).repeat(ROWS, COLUMNS)[:, :COLUMNS].bfloat16()
    shuffled = levels[:, torch.randperm(COLUMNS)]
    check_levels(packed, stored(tmp_path / "dense", {"weight": shuffled}), {MODULE: ROWS * COLUMNS})
    shuffled[0, 0] = 99  # one value more than four codes in each of two groups
    with pytest.raises(ValueError, match=r"9 values in a row, and .* codes for 8"):
        check_levels(packed, stored(tmp_path / "other", {"weight": shuffled}), {MODULE: ROWS * COLUMNS})


def test_weights_are_those_of_the_original(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "llama", hidden=64, ffn=128, max_shard_size="100KB")
    assert len(list(model.glob("*.safetensors"))) > 1
    assert weights_of(model, [MODULE, "model.layers.2.self_attn.k_proj"]) == {
        MODULE: 64 * 128,
        "model.layers.2.self_attn.k_proj": 64 * 32,
    }
    with pytest.raises(ValueError, match="no_proj"):
        weights_of(model, [MODULE, "no_proj"])


def test_a_dense_checkpoint_differs_in_what_was_replaced(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "llama", dtype=torch.bfloat16, max_shard_size="100KB")
    weight = torch.randn(128, 64)
    write_dense(model, tmp_path / "dense", {MODULE: weight})

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}

    original, dense = tensors(model), tensors(tmp_path / "dense")
    assert original.keys() == dense.keys()
    assert torch.equal(dense.pop(f"{MODULE}.weight"), weight.bfloat16())
    assert all(torch.equal(tensor, original[name]) for name, tensor in dense.items())
    assert {p.name for p in model.iterdir()} == {p.name for p in (tmp_path / "dense").iterdir()}
    with pytest.raises(ValueError, match=r"\(64, 128\) replaces \(128, 64\)"):
        write_dense(model, tmp_path / "turned", {MODULE: weight.T})
    with pytest.raises(ValueError, match="no_proj"):
        write_dense(model, tmp_path / "unknown", {"no_proj": weight})


def test_tokens_are_lrpqs_own_windows(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {n} houses stand on hill {n * n} ." for n in range(400)), encoding="utf-8")
    command = [str(tmp_path / "model"), "--calibration", str(text), "--text", str(text), "--windows", "9"]
    arguments = peers.parse([*command, "--length", "16", "--seed", "3"])
    path = tmp_path / "tokens.safetensors"
    peers.write_calibration(arguments, path)
    drawn = peers.load_windows(
        peers.parse_source(f"text:{text}"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
        num_windows=9 + 2,  # lrpq draws the held-out ones with them
        length=16,
        seed=3,
    ).tokens
    tokens = read_tokens(path)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, drawn[:9].long())


def test_tokens_and_requests_come_back(tmp_path: Path) -> None:
    tokens = torch.randint(0, 49152, (3, 7))
    write_tokens(tmp_path / "tokens", tokens[:, ::2].to(torch.int32))
    assert torch.equal(read_tokens(tmp_path / "tokens"), tokens[:, ::2])
    request = request_for(tmp_path, options={"iterations": "50"})
    write_request(request, tmp_path / "request.json")
    assert read_request(tmp_path / "request.json") == request


def request_for(folder: Path, **changes: Any) -> Request:
    fields = {
        "peer": "auto-round",
        "model": str(folder / "model"),
        "tokens": str(folder / "tokens"),
        "output": str(folder / "row"),
        "bits": 3,
        "group_size": 64,
        "device": "cpu",
        "seed": 0,
    }
    return Request(**{**fields, **changes})


def test_the_rulers_windows_are_spread_and_begin_as_the_tokenizer_begins(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = " ".join(f"hill {n} of houses" for n in range(200))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stride = len(ids) // 10 // 4
    found = windows_of(text, tokenizer, windows=4, length=10)
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    for index, window in enumerate(found.tolist()):
        piece = ids[index * stride * 10 :][:10]
        assert window == ([tokenizer.bos_token_id, *piece[:-1]] if begins else piece)
    assert len(windows_of(text, tokenizer, windows=10**6, length=10)) == len(ids) // 10
    with pytest.raises(SystemExit, match="fewer than one window"):
        windows_of("hill", tokenizer, windows=1, length=10)


def row(peer: str, **changes: Any) -> Row:
    fields = {
        "peer": peer,
        "bits": 3,
        "target_bits": 3.25,
        "all_in_bits": 3.25,
        "perplexity": 40.0,
        "kl_nats": 0.5,
        "kl_standard_error": 0.01,
        "seconds": 12.34,
        "peak_bytes": 1_500_000_000,
    }
    return Row(**{**fields, **changes})


def test_the_table_orders_rows_and_keeps_failures() -> None:
    failed = Row(peer="gptqmodel", bits=3, target_bits=3.25, failed="no compiler")
    rows = [row("four", target_bits=4.25), failed, row("worse", kl_nats=0.75), row("better", kl_nats=0.25)]
    lines = table(rows).splitlines()
    assert [text.split("|")[1].strip() for text in lines[2:]] == ["better", "worse", "gptqmodel", "four"]
    assert lines[3] == "| worse | 3.250 | 40.000 | 0.7500 +- 0.0100 | 12.3 | 1500 |"
    assert "failed: no compiler" in lines[4]
    assert len({text.count("|") for text in lines}) == 1
    assert "failed: no compiler" in line(failed)
    assert line(row("one", settings={"lr": "0.005"})).endswith("lr 0.005")


def test_a_peer_that_fails_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "write_calibration", lambda arguments, path: None)
    monkeypatch.setitem(peers.PEERS, "control", peers.Peer(module="not_there", environment=None))
    monkeypatch.setitem(peers.PEERS, "lrpq", peers.Peer(module="nor_this", environment=None))
    command = ["peers", "model", "--calibration", "c", "--text", "t", "--only", "lrpq", "control", "--bits", "3"]
    monkeypatch.setattr(sys, "argv", [*command, "--work", str(tmp_path), "--json", str(tmp_path / "rows.json")])
    with pytest.raises(SystemExit) as stopped:
        peers.main()
    assert stopped.value.code not in (0, None)
    printed = capsys.readouterr().out
    assert printed.index("nor_this") < printed.index("not_there")
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["peer"], r["kl_nats"]) for r in kept] == [("lrpq", None), ("control", None)]
    assert all("No module named" in r["failed"] for r in kept)
    assert "No module named" in (tmp_path / "control-3" / LOG).read_text()


def test_a_peer_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(60)\n", encoding="utf-8")
    interpreter = Interpreter(python=Path(sys.executable), path=(str(tmp_path),))
    with pytest.raises(PeerError, match="stopped after 1 s"):
        run_peer(request_for(tmp_path), "sleeper", interpreter, limit_seconds=1)


def test_a_peer_that_is_killed_says_by_what(tmp_path: Path) -> None:
    text = "import os\nprint('layer 7', flush=True)\nos.kill(os.getpid(), 9)\n"
    (tmp_path / "victim.py").write_text(text, encoding="utf-8")
    interpreter = Interpreter(python=Path(sys.executable), path=(str(tmp_path),))
    with pytest.raises(PeerError, match="signal 9 after: layer 7"):
        run_peer(request_for(tmp_path), "victim", interpreter, limit_seconds=None)


def test_a_ruler_that_fails_says_why(tmp_path: Path) -> None:
    ruler = Ruler(command=(sys.executable, "-c", "raise SystemExit('too short')"), text=tmp_path, windows=1, length=1,
                  device="cpu")  # fmt: skip
    with pytest.raises(RulerError, match="ruler: too short"):
        ruler.score(tmp_path, tmp_path)
    assert last_line("first\n\n last \n\n") == "last"


def test_options_belong_to_a_peer() -> None:
    options = ["auto-round:iterations=50", "auto-scheme:lr=0.005", "auto-round:lr=1e-2"]
    assert peers.options_for("auto-round", options) == {"iterations": "50", "lr": "1e-2"}
    assert peers.options_for("lrpq", options) == {}
    for wrong in ("iterations=50", "auto-round:iterations", "other:a=b"):
        with pytest.raises(SystemExit, match="PEER:NAME=VALUE"):
            peers.options_for("auto-round", [wrong])


def test_types_of_datasets_stand_in_only_where_it_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    assert with_datasets_types() == "installed"
    assert sys.modules["datasets"] is datasets
    for name in [name for name in sys.modules if name.partition(".")[0] == "datasets"]:
        monkeypatch.delitem(sys.modules, name)
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert with_datasets_types().startswith("types only")
    from datasets import Dataset
    from datasets.formatting.formatting import LazyRow

    assert isinstance(LazyRow, type)
    with pytest.raises(TypeError, match="not installed"):
        Dataset()
