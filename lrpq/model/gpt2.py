"""GPT-2 read as GPTBigCode: the same computation, with linear layers instead of transposed ``Conv1D``.

No format of compressed weights has ``Conv1D``; GPTBigCode with one key and value head a query head is GPT-2 with
``nn.Linear``. Weights are transposed views of what is stored, so that products are computed on the same memory in the
same order; the rows of the fused q, k, v layer are reordered, head by head. docs/adr/0008 says why.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPTBigCodeConfig

from lrpq.errors import ModelError
from lrpq.model.safetensors_source import ModelSource

ARCHITECTURE = "GPT2LMHeadModel"
_CONV1D = re.compile(r"(?:^|\.)h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
_QKV = re.compile(r"(?:^|\.)h\.\d+\.attn\.c_attn\.(?:weight|bias)$")
_MASKS = re.compile(r"(?:^|\.)h\.\d+\.attn\.(?:bias|masked_bias)$")  # old checkpoints store the causal mask
_INEXACT = ("scale_attn_by_inverse_layer_idx", "add_cross_attention")
_ONLY_GPT2 = ("architectures", "model_type", "reorder_and_upcast_attn", "auto_map", "transformers_version", *_INEXACT)


class GPT2AsGPTBigCode(ModelSource):
    """A GPT-2 folder that reads as a GPTBigCode model of the same name and bytes.

    Raises:
        ModelError: the configuration uses what GPTBigCode does not have.
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
        gpt2 = self.config
        for field in _INEXACT:
            if getattr(gpt2, field, False):
                raise ModelError(f"model {self.folder}: GPT-2 with {field} is not supported")
        self._document = _bigcode_document(super().config_document())
        self.config = GPTBigCodeConfig.from_dict(self._document)
        heads, width = int(gpt2.num_attention_heads), int(gpt2.hidden_size)
        # stored: all heads' q, then k, then v; wanted: q, k, v of the first head, of the second, ...
        self._order = torch.arange(3 * width).view(3, heads, width // heads).transpose(0, 1).reshape(-1)

    def config_document(self) -> dict[str, Any]:
        """The configuration to write, as GPTBigCode's."""
        return dict(self._document)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return [name for name in super().names() if not _MASKS.search(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        shape = super().shape(name)
        return shape[::-1] if _CONV1D.search(name) else shape

    def read(self, name: str) -> Tensor:
        """Read one tensor; see `ModelSource.read`."""
        tensor = super().read(name)
        if _QKV.search(name):
            tensor = tensor[..., self._order]
        return tensor.t() if _CONV1D.search(name) else tensor


def _bigcode_document(document: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in document.items() if key not in _ONLY_GPT2}
    defaults = {"activation_function": "gelu_new"}  # GPT-2's; GPTBigCode has another
    return {
        **defaults,
        **kept,
        "architectures": ["GPTBigCodeForCausalLM"],
        "model_type": "gpt_bigcode",
        "multi_query": False,
        "attention_softmax_in_fp32": False,
        "scale_attention_softmax_in_fp32": False,
    }
