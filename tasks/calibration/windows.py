"""Documents to token windows of one length: what the model is calibrated on and measured on."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lrpq.errors import CalibrationError, ConfigError
from tasks.calibration.chat import Conversation, render
from tasks.calibration.documents import Document

if TYPE_CHECKING:
    from jaxtyping import Int64


Tokens: TypeAlias = npt.NDArray[np.int64]
Placement: TypeAlias = Literal["random", "spread", "first"]

POOL = 8  # random windows are drawn from this many times as much text, where the source has it
# 128 MiB of ids: "spread" reads a source to its end, which some data sets do not have.
MAX_STREAM_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """Token windows of one length, with what is needed to name and to compare them."""

    tokens: Int64[Tensor, "num_windows length"]
    source: str
    digest: str = field(init=False)
    """sha256 over the shape and the token ids (little-endian int64)."""
    documents_digest: str
    """sha256 over the documents that were read, each with its length; of the tokens where there are none."""
    num_documents: int
    stream_tokens: int
    """Tokens that the windows were chosen from."""
    asked_windows: int
    """Windows asked for; more than there are where the text was too short for all."""
    exhausted: bool
    """Whether the source was read to its end."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", tokens_digest(self.tokens))

    @property
    def num_windows(self) -> int:
        """Number of windows."""
        return int(self.tokens.shape[0])

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return int(self.tokens.shape[1])

    @property
    def missing_windows(self) -> int:
        """Windows that were asked for and that the text was too short for."""
        return self.asked_windows - self.num_windows


def tokenize_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    *,
    num_windows: int,
    length: int,
    seed: int,
    placement: Placement = "random",
    source: str = "documents",
) -> Windows:
    """Cut documents into windows.

    Texts are tokenised without special tokens and joined into one stream. ``spread`` takes every k-th of the
    stream's consecutive windows, k as large as it goes; ``first`` takes the first ones; ``random`` draws
    windows that do not overlap, by the seed and in random order, from ``POOL`` times the text needed or
    from all there is. Where the tokenizer adds a BOS token, it goes in front of a window and the
    window's last token is dropped.

    Conversations are rendered by the chat template. A window begins with the beginning of a conversation;
    more follow until it is full; what then is left of the last one is dropped, and the next window begins
    with the next conversation. BOS goes in front where the tokenizer adds one and the template did not
    write it.

    Fewer windows than asked for are given where the text is too short: see ``Windows.missing_windows``.

    Raises:
        CalibrationError: no text, fewer tokens than one window, texts mixed with conversations, no chat
            template.
        ConfigError: the counts or the placement are impossible.
    """
    check_request(num_windows=num_windows, length=length, placement=placement)
    reader = _Reader(documents, source=source)
    bos = bos_token(tokenizer)
    limit_tokens = MAX_STREAM_TOKENS
    if placement != "spread":
        limit_tokens = num_windows * length * (POOL if placement == "random" else 1)
    if reader.holds_chat:
        rows, stream_tokens = _chat_rows(tokenizer, reader, length=length, bos=bos, limit_tokens=limit_tokens)
        starts = np.arange(len(rows)) * length
        stream = np.concatenate([*rows, np.empty(0, np.int64)])
        chosen = choose_windows(len(rows), num_windows=num_windows, seed=seed, placement=placement)
        starts = starts[chosen]
    else:
        stream = _stream(tokenizer, reader, limit_tokens=limit_tokens)
        stream_tokens = len(stream)
        starts = _text_starts(len(stream), num_windows=num_windows, length=length, seed=seed, placement=placement)
    if len(starts) == 0:
        raise CalibrationError(too_short(source, found=stream_tokens, length=length))
    tokens = np.stack([stream[start : start + length] for start in starts])
    if bos is not None and not reader.holds_chat:
        tokens = np.concatenate([np.full((len(tokens), 1), bos), tokens[:, :-1]], axis=1)
    return Windows(
        tokens=torch.from_numpy(tokens),
        source=source,
        documents_digest=reader.digest.hexdigest(),
        num_documents=reader.num_documents,
        stream_tokens=stream_tokens,
        asked_windows=num_windows,
        exhausted=reader.exhausted,
    )


def tokens_digest(tokens: Int64[Tensor, "num_windows length"]) -> str:
    """sha256 over the shape and the ids, the same on every machine."""
    shape = "x".join(map(str, tokens.shape)).encode()
    return hashlib.sha256(shape + b":" + tokens.numpy().astype("<i8").tobytes()).hexdigest()


def check_request(*, num_windows: int, length: int, placement: str) -> None:
    """Raise ConfigError unless the counts are positive, a window holds two tokens and the placement is known."""
    if num_windows < 1 or length < 2:
        raise ConfigError(f"{num_windows} windows of {length} tokens: expected at least 1 window of at least 2 tokens")
    if placement not in ("random", "spread", "first"):
        raise ConfigError(f"unknown placement {placement!r} of windows; write random, spread or first")


def bos_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token where this tokenizer puts one in front of a text, else None."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a").input_ids[:1] == [bos] else None


def too_short(source: str, *, found: int, length: int) -> str:
    """Message for a source that does not fill one window."""
    if found == 0:
        return f"{source}: the text is empty, {length} tokens needed for one window; name another source"
    return f"{source}: {found} tokens found, {length} needed for one window; give a longer text or shorter windows"


def choose_windows(available: int, *, num_windows: int, seed: int, placement: Placement) -> Tokens:
    """Indices of the windows taken from ``available`` ones; fewer than asked for where there are fewer."""
    count = min(num_windows, available)
    if placement == "random":
        return np.random.default_rng(seed).permutation(available)[:count]
    stride = available // count if placement == "spread" and count else 1
    return np.arange(count) * stride


class _Reader:
    """Hands out documents, counts and digests them, and knows whether the source came to its end."""

    def __init__(self, documents: Iterable[Document], *, source: str) -> None:
        self._rest = iter(documents)
        first = next(self._rest, None)
        self._head: list[Document] = [] if first is None else [first]
        self.holds_chat = first is not None and not isinstance(first, str)
        self.source = source
        self.digest = hashlib.sha256()
        self.num_documents = 0
        self.exhausted = False

    def texts(self, text_of: Callable[[Document], str]) -> Iterator[str]:
        for document in itertools.chain(self._head, self._rest):
            if isinstance(document, str) == self.holds_chat:
                raise CalibrationError(
                    f"{self.source}: document {self.num_documents + 1} mixes plain text with chat "
                    "conversations; name one column with --text-column"
                )
            text = text_of(document)
            encoded = text.encode("utf-8", "surrogatepass")
            self.digest.update(len(encoded).to_bytes(8, "little") + encoded)
            self.num_documents += 1
            yield text
        self.exhausted = True


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    # verbose=False: a stream longer than the model's context is meant here, not a mistake to warn of
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=np.int64)


def _stream(tokenizer: PreTrainedTokenizerBase, reader: _Reader, *, limit_tokens: int) -> Tokens:
    parts: list[Tokens] = []
    num_tokens = 0
    for text in reader.texts(str):
        parts.append(_ids(tokenizer, text))
        num_tokens += len(parts[-1])
        if num_tokens >= limit_tokens:
            break
    return np.concatenate([*parts, np.empty(0, np.int64)])


def _text_starts(num_tokens: int, *, num_windows: int, length: int, seed: int, placement: Placement) -> Tokens:
    """Where the windows begin in a stream."""
    available = num_tokens // length
    if placement != "random":
        return choose_windows(available, num_windows=num_windows, seed=seed, placement=placement) * length
    count = min(num_windows, available)
    generator = np.random.default_rng(seed)
    # Sorted draws from the tokens left over, pushed apart by one window each: no overlap, no rejection. The
    # order is then shuffled, so that the first windows of a run are a sample of the whole text as well.
    left_over = np.sort(generator.integers(0, num_tokens - count * length + 1, size=count))
    return generator.permutation(left_over + np.arange(count) * length)


def _chat_rows(
    tokenizer: PreTrainedTokenizerBase, reader: _Reader, *, length: int, bos: int | None, limit_tokens: int
) -> tuple[list[Tokens], int]:
    """Full windows of conversations, and the number of tokens that were rendered."""

    def render_one(document: Document) -> str:
        conversation: Conversation = [] if isinstance(document, str) else document
        return render(tokenizer, conversation, where=f"{reader.source}: conversation {reader.num_documents + 1}")

    rows: list[Tokens] = []
    parts: list[Tokens] = []
    filled = num_tokens = 0
    for text in reader.texts(render_one):
        ids = _ids(tokenizer, text)
        num_tokens += len(ids)
        if not parts and bos is not None and ids[:1].tolist() != [bos]:
            parts, filled = [np.array([bos], np.int64)], 1
        parts.append(ids)
        filled += len(ids)
        if filled >= length:
            rows.append(np.concatenate(parts)[:length])
            parts, filled = [], 0
        if len(rows) * length >= limit_tokens:
            break
    return rows, num_tokens
