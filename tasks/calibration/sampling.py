"""Windows sampled from the model itself: calibration without any text (as LLM-QAT generates its data).

``sample_windows`` only needs a function from tokens to next-token logits, so a streaming executor can
supply one; ``self_windows`` loads a small model whole and steps it with a key-value cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lrpq.errors import CalibrationError, ConfigError, ModelError
from tasks.calibration.windows import Windows, check_request

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    ModelForward: TypeAlias = Callable[[Int64[Tensor, "n t"]], Float[Tensor, "n vocab"]]

MAX_MODEL_BYTES = 8 << 30  # one forward pass per token of the window: larger models take hours on a CPU
SAMPLE_BATCH = 16


def sample_windows(
    model_forward: ModelForward,
    *,
    num_windows: int,
    length: int,
    bos: int,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = SAMPLE_BATCH,
) -> Windows:
    """Sample windows token by token; each begins with ``bos`` and runs on through end-of-text tokens.

    ``model_forward`` takes all tokens so far, int64 ``[n, t]``, and returns the logits of the next one,
    ``[n, vocab]`` in any float dtype. Within a batch it is called with t = 1, 2, ..., each time with one more
    column behind the same ones, so it may keep a cache and look at the new column only; t = 1 starts a new
    batch. Window i draws from its own generator, seeded by ``seed`` and i, so the batch size only acts
    through the rounding of logits. Softmax and inverse-CDF sampling are float64.

    Raises:
        ConfigError: impossible counts, or a temperature that is not positive.
        ModelError: logits that are not finite.
    """
    check_request(num_windows=num_windows, length=length, placement="first")
    if not temperature > 0:
        raise ConfigError(f"self: temperature {temperature}, expected a positive number")
    if batch_size < 1:
        raise ConfigError(f"self: batch size {batch_size}, expected at least 1")
    batches = []
    for first in range(0, num_windows, batch_size):
        indices = range(first, min(first + batch_size, num_windows))
        uniforms = torch.stack([_uniforms(seed, index, length - 1) for index in indices])
        tokens = torch.full((len(indices), 1), bos, dtype=torch.int64)
        for t in range(length - 1):
            logits = model_forward(tokens)
            drawn = _draw(logits, uniforms[:, t], temperature=temperature, t=t)
            tokens = torch.cat([tokens, drawn[:, None]], dim=1)
        batches.append(tokens)
    name = f"self(seed={seed}, temperature={temperature})"
    return Windows(
        tokens=torch.cat(batches),
        source=name,
        documents_digest=hashlib.sha256(name.encode()).hexdigest(),
        num_documents=num_windows,
        stream_tokens=num_windows * length,
        asked_windows=num_windows,
        exhausted=False,
    )


def self_windows(
    model_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_windows: int,
    length: int,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = SAMPLE_BATCH,
) -> Windows:
    """Sample windows from a local model, loaded whole on the CPU in its stored dtype.

    Windows begin with the tokenizer's BOS token, also where it does not add one to a text; else with its
    EOS token.

    Raises:
        CalibrationError: the weights exceed ``MAX_MODEL_BYTES``, or the tokenizer has neither BOS nor EOS.
        ModelError: no model in the folder, or logits that are not finite.
    """
    check_request(num_windows=num_windows, length=length, placement="first")
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise CalibrationError("self: the tokenizer has neither a BOS nor an EOS token to start from; use text:FILE")
    num_bytes = sum(file.stat().st_size for file in Path(model_dir).glob("*.safetensors"))
    if num_bytes == 0:
        raise ModelError(f"{model_dir}: no safetensors found; 'self' samples from a local folder of safetensors")
    if num_bytes > MAX_MODEL_BYTES:
        raise CalibrationError(
            f"self: {model_dir} holds {num_bytes / 2**30:.1f} GiB of weights, over the limit of "
            f"{MAX_MODEL_BYTES / 2**30:.0f} GiB for sampling on a CPU; use text:FILE or hub:DATASET"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise ModelError(f"{model_dir}: cannot be loaded ({str(error).splitlines()[0]})") from error
    return sample_windows(
        CachedStep(model),
        num_windows=num_windows,
        length=length,
        bos=bos,
        seed=seed,
        temperature=temperature,
        batch_size=batch_size,
    )


class CachedStep:
    """A transformers model as the ``model_forward`` of ``sample_windows``: only new columns are computed."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        self._seen = 0

    @torch.no_grad()
    def __call__(self, tokens: Int64[Tensor, "n t"]) -> Float[Tensor, "n vocab"]:
        """Logits behind the last column; a call with no more columns than before starts anew."""
        if tokens.shape[1] <= self._seen:
            self._cache, self._seen = None, 0
        output = self._model(tokens[:, self._seen :], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._seen = output.past_key_values, tokens.shape[1]
        logits: Tensor = output.logits[:, -1]
        return logits


def _uniforms(seed: int, index: int, count: int) -> Tensor:
    """Numbers in [0, 1) that belong to one window, whatever batch it is sampled in."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _draw(logits: Float[Tensor, "n vocab"], uniform: Tensor, *, temperature: float, t: int) -> Tensor:
    if not torch.isfinite(logits).all():
        raise ModelError(f"self: the logits behind token {t} are not finite; the model cannot be sampled from")
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    # scaled by the last entry, which rounding leaves off 1; right=True skips tokens of probability zero
    threshold = uniform[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return drawn.clamp(max=logits.shape[-1] - 1)
