"""Questions to tokens, divided into context and continuation as lm-evaluation-harness does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from lrpq.errors import CalibrationError, ModelError
from lrpq.evaluate.tasks import Continuation
from tasks.calibration.windows import bos_token
from tasks.questions import Question, QuestionFile


def encode_questions(
    file: QuestionFile, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, longest: int | None
) -> list[list[Continuation]]:
    """Every question's choices as tokens.

    Args:
        file: the questions.
        tokenizer: the model's.
        vocab_size: the model's number of embeddings.
        longest: tokens that the model reads at most (lm-evaluation-harness cuts the context instead of refusing).

    Raises:
        CalibrationError: a choice without tokens of its own, or longer with its context than the model reads.
        ModelError: the tokenizer is not the model's.
    """
    bos = bos_token(tokenizer)
    found = []
    for question in file.questions:
        where = f"{file.path}, line {question.line}"
        encoded = encode_question(question, tokenizer, bos=bos, where=where)
        for position, continuation in enumerate(encoded):
            if not continuation.tokens:
                raise CalibrationError(
                    f"{where}: choice {position} adds no token to its context; begin it with a space or another letter"
                )
            length = len(continuation.read)
            if longest is not None and length > longest:
                raise CalibrationError(
                    f"{where}: choice {position} makes {length} tokens with its context, the model reads at most "
                    f"{longest}; shorten the context"
                )
            largest = max(continuation.context + continuation.tokens)
            if largest >= vocab_size:
                raise ModelError(
                    f"{where}: the tokenizer gives token {largest}, the model has {vocab_size}; its tokenizer is "
                    "another model's"
                )
        found.append(encoded)
    return found


def encode_question(
    question: Question, tokenizer: PreTrainedTokenizerBase, *, bos: int | None, where: str = "question"
) -> list[Continuation]:
    """Tokens of the context, and for each choice tokens(context + choice) without the first as many.

    Spaces at the end of the context move to the choices, for a word's token has the space before it. BOS goes in front
    where the tokenizer adds one and the text does not begin with it; no token is put behind, whatever the tokenizer
    does. Without a context, BOS is the context, or EOS where there is no BOS.

    Raises:
        CalibrationError: no context, and a tokenizer without either.
    """
    context = question.context.rstrip()
    moved = question.context[len(context) :]
    if not context:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise CalibrationError(f"{where}: ctx is empty and the tokenizer has no BOS and no EOS; give a context")
        alone = _ids(tokenizer, [moved + choice for choice in question.choices])
        return [Continuation(context=(first,), tokens=tokens) for tokens in alone]
    texts = [context, *(context + moved + choice for choice in question.choices)]
    start, *wholes = (_with_bos(tokens, bos) for tokens in _ids(tokenizer, texts))
    return [Continuation(context=start, tokens=whole[len(start) :]) for whole in wholes]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterable[tuple[int, ...]]:
    # verbose=False: what is too long is refused, not warned of
    return map(tuple, tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids)


def _with_bos(tokens: tuple[int, ...], bos: int | None) -> tuple[int, ...]:
    return tokens if bos is None or tokens[:1] == (bos,) else (bos, *tokens)
