"""GPT-2 read as OPT: the same computation, with linear layers instead of transposed ``Conv1D``.

No format of compressed weights has ``Conv1D``. OPT, with learned positions, norms before the layers, a final norm and
GPT-2's activation, computes the same with ``nn.Linear``; its positions begin at the third row of their table. Weights
are transposed views of what is stored, so that products are computed on the same memory in the same order.
docs/adr/0008 says why OPT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import OPTConfig

from lrpq.errors import ModelError
from lrpq.model.safetensors_source import ModelSource, one_line

ARCHITECTURE = "GPT2LMHeadModel"
POSITION_OFFSET = 2  # OPT's table of positions has two rows in front that are never used
LAYER_NORM_EPSILON = 1e-5  # OPT's is fixed
_BLOCK = re.compile(r"h\.(\d+)\.(.+)")
_OUTER = {
    "wte.weight": "model.decoder.embed_tokens.weight",
    "wpe.weight": "model.decoder.embed_positions.weight",
    "ln_f.weight": "model.decoder.final_layer_norm.weight",
    "ln_f.bias": "model.decoder.final_layer_norm.bias",
    "lm_head.weight": "lm_head.weight",
}
_INNER = {
    "ln_1": ("self_attn_layer_norm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.out_proj",),
    "ln_2": ("final_layer_norm",),
    "mlp.c_fc": ("fc1",),
    "mlp.c_proj": ("fc2",),
}
_MASKS = ("attn.bias", "attn.masked_bias")  # old checkpoints store the causal mask


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of the OPT model as a part of one that is stored."""

    stored: str
    index: int
    """Which of the ``parts`` along the last axis."""
    parts: int
    transposed: bool
    rows_in_front: int
    """Rows of zeros that are not stored."""


class GPT2AsOPT(ModelSource):
    """A GPT-2 folder that reads as an OPT model.

    Raises:
        ModelError: the configuration uses what OPT does not have, or a tensor is not GPT-2's.
    """

    as_on_disk: ClassVar[bool] = False

    def __init__(self, folder: Path | str) -> None:
        self._gpt2 = ModelSource(folder)  # everything public is answered from it, under other names
        self.folder = self._gpt2.folder
        _check_exact(self._gpt2.config, self.folder)
        self._parts = {name: part for s in self._gpt2.names() for name, part in _opt_tensors(s, self.folder)}
        self._document = _opt_document(self._gpt2.config, self._gpt2.config_document())
        try:
            self.config = OPTConfig.from_dict(self._document)
        except Exception as error:  # whatever transformers raises, as in ModelSource
            raise ModelError(f"{self.folder / 'config.json'}: no configuration of GPT-2 ({one_line(error)})") from error

    def config_document(self) -> dict[str, Any]:
        """The configuration to write, as OPT's."""
        return dict(self._document)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        part = self._part(name)
        shape = list(self._gpt2.shape(part.stored))
        shape[-1] //= part.parts
        shape[0] += part.rows_in_front
        return tuple(shape[::-1] if part.transposed else shape)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor; see `ModelSource.dtype`."""
        return self._gpt2.dtype(self._part(name).stored)

    def nbytes(self, name: str) -> int:
        """Bytes a tensor takes in the stored dtype."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str) -> Tensor:
        """Read one tensor; see `ModelSource.read`."""
        part = self._part(name)
        tensor = self._gpt2.read(part.stored)
        if part.parts > 1:
            tensor = tensor.chunk(part.parts, dim=-1)[part.index]
        if part.rows_in_front:
            tensor = torch.cat([tensor.new_zeros(part.rows_in_front, *tensor.shape[1:]), tensor])
        return tensor.t() if part.transposed else tensor

    def _part(self, name: str) -> _Part:
        if name not in self._parts:
            raise ModelError(f"model {self.folder}: has no tensor for {name} (GPT-2 read as OPT); it is incomplete")
        return self._parts[name]


def _opt_tensors(stored: str, folder: Path) -> list[tuple[str, _Part]]:
    """The OPT tensors that a stored one holds; none for a causal mask."""
    name = stored.removeprefix("transformer.")
    if name in _OUTER:
        front = POSITION_OFFSET if name == "wpe.weight" else 0
        return [(_OUTER[name], _Part(stored, 0, 1, False, front))]
    match = _BLOCK.fullmatch(name)
    if match is not None:
        block, inner = match.groups()
        if inner in _MASKS:
            return []
        module, _, kind = inner.rpartition(".")
        if module in _INNER and kind in ("weight", "bias"):
            targets = _INNER[module]
            transposed = kind == "weight" and not module.startswith("ln_")
            return [
                (f"model.decoder.layers.{block}.{target}.{kind}", _Part(stored, i, len(targets), transposed, 0))
                for i, target in enumerate(targets)
            ]
    raise ModelError(f"tensor {stored} in {folder}: not one of GPT-2")


def _check_exact(config: Any, folder: Path) -> None:
    """Refuse what OPT would compute differently."""
    wrong: dict[str, Callable[[Any], bool]] = {
        "scale_attn_weights": lambda value: not value,
        "scale_attn_by_inverse_layer_idx": bool,
        "add_cross_attention": bool,
        "layer_norm_epsilon": lambda value: value != LAYER_NORM_EPSILON,
    }
    for field, is_wrong in wrong.items():
        value = getattr(config, field)
        if is_wrong(value):
            raise ModelError(
                f"model {folder}: GPT-2 with {field}={value} is not supported; OPT, as which it is read, "
                "computes something else"
            )


def _opt_document(config: Any, document: dict[str, Any]) -> dict[str, Any]:
    kept = ("dtype", "torch_dtype", "use_cache", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    return {
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        **{key: document[key] for key in kept if key in document},
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "pad_token_id": config.pad_token_id if config.pad_token_id is not None else config.eos_token_id,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "word_embed_proj_dim": config.n_embd,
        "ffn_dim": config.n_inner if config.n_inner is not None else 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_positions,
        "activation_function": config.activation_function,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
        "dropout": config.resid_pdrop,
        "attention_dropout": config.attn_pdrop,
        "init_std": config.initializer_range,
    }
