"""Environments of ``benchmarks.peers``: from local wheels by the real pip, and pinned."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import environments


def wheel(folder: Path, *, version: str) -> None:
    """A package of one module, as small as pip takes it."""
    folder.mkdir(exist_ok=True)
    info = f"lonely-{version}.dist-info"
    files = {
        "lonely.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: lonely\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"lonely-{version}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def test_an_environment_from_wheels_is_made_once_for_its_requirements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    requirements = tmp_path / "peer.wheels.txt"
    requirements.write_text("lonely==1.0\n", encoding="utf-8")
    wheels = tmp_path / "wheels"
    wheel(wheels, version="1.0")
    interpreter = environments.environment("peer", tmp_path / "made", wheels=wheels)
    (folder,) = interpreter.path
    module = Path(folder) / "lonely.py"
    assert "1.0" in module.read_text(encoding="utf-8")
    module.write_text("KEPT = True\n", encoding="utf-8")
    requirements.write_text("# a comment changes nothing\nlonely==1.0\n", encoding="utf-8")
    assert environments.environment("peer", tmp_path / "made", wheels=wheels) == interpreter
    assert "KEPT" in module.read_text(encoding="utf-8")
    requirements.write_text("lonely==2.0\n", encoding="utf-8")
    with pytest.raises(environments.EnvironmentNotMade, match=r"lonely==2\.0"):
        environments.environment("peer", tmp_path / "made", wheels=wheels)
    wheel(wheels, version="2.0")
    environments.environment("peer", tmp_path / "made", wheels=wheels)
    assert "2.0" in module.read_text(encoding="utf-8")


def test_every_environment_is_pinned_and_the_wheels_are_of_its_versions() -> None:
    def pins(path: Path) -> dict[str, str]:
        lines = [text for text in path.read_text(encoding="utf-8").splitlines() if not text.startswith("#")]
        return {name.lower(): version for name, _, version in (text.partition("==") for text in lines)}

    names = {peer.environment for peer in peers.PEERS.values() if peer.environment is not None}
    for name in names:
        whole = pins(environments.REQUIREMENTS / f"{name}.txt")
        assert all(whole.values())
        assert "torch" not in whole
        wheels = environments.REQUIREMENTS / f"{name}.wheels.txt"
        if wheels.exists():
            assert pins(wheels).items() <= whole.items()
        else:
            with pytest.raises(environments.EnvironmentNotMade, match=f"{name} .* source alone"):
                environments.environment(name, Path("nowhere"), wheels=Path("nothing"))
