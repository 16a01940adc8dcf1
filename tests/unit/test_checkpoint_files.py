"""Layout of the weight files, byte by byte, and the folder that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from lrpq.checkpoint.layout import DTYPE_NAMES, StoredTensor, open_shard, plan_shards
from lrpq.checkpoint.publish import published_folder
from lrpq.errors import CheckpointError, ConfigError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
UNITS = st.lists(
    st.lists(st.tuples(st.sampled_from(list(DTYPE_NAMES)), SHAPES), min_size=1, max_size=3),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(units=UNITS, limit=st.integers(1, 400), seed=st.integers(0, 9))
def test_any_tensors_are_read_back_by_the_library(
    tmp_path_factory: pytest.TempPathFactory,
    units: list[list[tuple[torch.dtype, tuple[int, ...]]]],
    limit: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    planned = [
        [StoredTensor(name=f"µ.{i}.{j}", dtype=dtype, shape=shape) for j, (dtype, shape) in enumerate(unit)]
        for i, unit in enumerate(units)
    ]
    torch.manual_seed(seed)
    values = {t.name: (torch.randn(t.shape) * 50).to(t.dtype) for unit in planned for t in unit}
    read: dict[str, torch.Tensor] = {}
    shards = plan_shards(planned, max_shard_bytes=limit)
    for shard in shards:
        with open_shard(folder, shard) as writer:
            for name in sorted(shard.offsets, reverse=True):  # any order
                writer.write(name, values[name])
        path = folder / shard.file_name
        assert path.stat().st_size == shard.nbytes
        read.update(load_file(path))
        with safe_open(path, "pt") as f:
            assert f.metadata() == {"format": "pt"}
        for unit in shard.units:
            for tensor in unit:
                assert shard.offsets[tensor.name] % tensor.dtype.itemsize == 0
        data = sum(t.nbytes for unit in shard.units for t in unit)
        assert data <= limit or len(shard.units) == 1
    assert [tuple(unit) for unit in planned] == [unit for shard in shards for unit in shard.units]
    assert read.keys() == values.keys()
    for name, expected in values.items():
        assert read[name].dtype == expected.dtype
        assert torch.equal(read[name], expected)


def test_views_are_written_as_their_values(tmp_path: Path) -> None:
    values = torch.arange(12, dtype=torch.float32).view(3, 4).T[1:]
    (shard,) = plan_shards([[StoredTensor(name="a", dtype=torch.float32, shape=(3, 3))]], max_shard_bytes=1)
    with open_shard(tmp_path, shard) as writer:
        writer.write("a", values)
    assert shard.file_name == "model.safetensors"
    assert torch.equal(load_file(tmp_path / shard.file_name)["a"], values)


def test_writer_refuses_what_was_not_planned(tmp_path: Path) -> None:
    planned = [[StoredTensor(name=name, dtype=torch.int32, shape=(2,))] for name in "ab"]
    (shard,) = plan_shards(planned, max_shard_bytes=100)
    zeros = torch.zeros(2, dtype=torch.int32)
    with (
        pytest.raises(CheckpointError, match=r"expected torch\.int32"),
        open_shard(tmp_path, shard) as writer,
    ):
        writer.write("a", torch.zeros(2))
    with open_shard(tmp_path, shard) as writer:
        writer.write("a", zeros)
        with pytest.raises(CheckpointError, match="twice or was not planned"):
            writer.write("a", zeros)
        writer.write("b", zeros)
    with pytest.raises(CheckpointError, match="b was never written"), open_shard(tmp_path, shard) as writer:
        writer.write("a", zeros)
    with pytest.raises(CheckpointError, match="planned twice"):
        plan_shards([planned[0], planned[0]], max_shard_bytes=100)
    with pytest.raises(CheckpointError, match="complex64"):
        plan_shards([[StoredTensor(name="c", dtype=torch.complex64, shape=(1,))]], max_shard_bytes=100)


def test_full_disk_is_an_error_at_the_tensor_that_does_not_fit(tmp_path: Path) -> None:
    (shard,) = plan_shards([[StoredTensor(name="a", dtype=torch.uint8, shape=(9,))]], max_shard_bytes=100)
    full = tmp_path / "full"
    full.mkdir()
    (full / shard.file_name).symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="No space left"), open_shard(full, shard):
        pass
    with pytest.raises(CheckpointError, match="cannot be created"), open_shard(tmp_path / "none", shard):
        pass


class TestPublishedFolder:
    def test_appears_at_the_end(self, tmp_path: Path) -> None:
        output = tmp_path / "new/out"
        with published_folder(output) as folder:
            (folder / "sub").mkdir()
            (folder / "sub/a").write_text("1")
            assert not output.exists()
        assert (output / "sub/a").read_text() == "1"
        assert [p.name for p in output.parent.iterdir()] == ["out"]

    def test_empty_folder_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with published_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
        assert (tmp_path / "out/a").exists()

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_vanishes_on_an_exception(self, tmp_path: Path, error: type[BaseException]) -> None:
        def write() -> None:
            with published_folder(tmp_path / "out") as folder:
                (folder / "a").write_text("1")
                raise error

        with pytest.raises(error):
            write()
        assert not list(tmp_path.iterdir())

    def test_taken_outputs_are_refused_and_untouched(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("1")
        (tmp_path / "full").mkdir()
        (tmp_path / "full/photo").write_text("1")
        for name, overwrite, message in (
            ("file", True, "is a file"),
            ("full", False, "not empty"),
            ("full", True, r"no lrpq\.json"),
        ):
            with pytest.raises(ConfigError, match=message):
                with published_folder(tmp_path / name, overwrite=overwrite):
                    pass
        with pytest.raises(ConfigError, match="cannot be created"), published_folder(tmp_path / "file/out"):
            pass
        with pytest.raises(ConfigError, match="mount point"), published_folder(Path("/proc")):
            pass
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "photo"]

    def test_output_filled_meanwhile_is_not_replaced(self, tmp_path: Path) -> None:
        output = tmp_path / "out"

        def write() -> None:
            with published_folder(output):
                output.mkdir()
                (output / "theirs").write_text("1")

        with pytest.raises(ConfigError, match="not empty"):
            write()
        assert (output / "theirs").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_second_writer_is_refused_while_the_first_lives(self, tmp_path: Path) -> None:
        with published_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            with pytest.raises(ConfigError, match="another process"), published_folder(tmp_path / "out"):
                pass
            assert (folder / "a").exists()
        assert (tmp_path / "out/a").exists()

    def test_what_a_killed_writer_left_is_cleared(self, tmp_path: Path) -> None:
        output = tmp_path / "out"
        code = (
            "import os, signal, sys; from pathlib import Path\n"
            "from lrpq.checkpoint.publish import published_folder\n"
            "with published_folder(Path(sys.argv[1])) as folder:\n"
            "    (folder / 'half').write_text('1'); os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        killed = subprocess.run([sys.executable, "-c", code, str(output)], check=False)
        assert killed.returncode == -9
        assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
        with published_folder(output) as folder:
            (folder / "whole").write_text("1")
        assert [p.name for p in output.iterdir()] == ["whole"]
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_kill_between_the_two_renames_loses_neither(self, tmp_path: Path) -> None:
        (tmp_path / ".out.replaced").mkdir()
        (tmp_path / ".out.replaced/lrpq.json").write_text("old")
        with pytest.raises(RuntimeError), published_folder(tmp_path / "out", overwrite=True):
            raise RuntimeError
        assert (tmp_path / "out/lrpq.json").read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_lock_on_a_folder_that_was_renamed_away_counts_for_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other process finishes between this one's opening of the folder and its lock."""
        real = fcntl.flock

        def finish_first(handle: int, operation: int) -> None:
            os.rename(tmp_path / ".out.partial", tmp_path / "out")
            (tmp_path / "out/theirs").write_text("1")
            real(handle, operation)

        monkeypatch.setattr(fcntl, "flock", finish_first)
        with pytest.raises(ConfigError, match="another process"), published_folder(tmp_path / "out"):
            pass
        assert (tmp_path / "out/theirs").exists()
