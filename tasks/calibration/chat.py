"""Chat conversations: recognised in rows of data sets, rendered by the tokenizer's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict, TypeGuard

import jinja2
from transformers import PreTrainedTokenizerBase

from lrpq.errors import CalibrationError


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Conversation: TypeAlias = list[Message]

MESSAGE_COLUMNS = ("messages", "conversations")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}  # the ShareGPT names


def is_conversation(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a cell of a row is a list of messages."""
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Mapping)


def read_conversation(cell: Sequence[object], *, where: str) -> Conversation:
    """Bring ``{role, content}`` or ShareGPT's ``{from, value}`` messages into one form.

    Raises:
        CalibrationError: a message without role or text, e.g. one that carries an image.
    """
    conversation: Conversation = []
    for position, message in enumerate(cell, 1):
        if not isinstance(message, Mapping):
            raise CalibrationError(
                f"{where}: message {position} is {type(message).__name__}, "
                "expected {role, content} or {from, value} with text content"
            )
        role = message.get("role", message.get("from"))
        content = _text_of(message.get("content", message.get("value")))
        if not isinstance(role, str) or content is None:
            raise CalibrationError(
                f"{where}: message {position} has no role and text (keys {sorted(message)}); expected "
                "{role, content} or {from, value} with text content"
            )
        conversation.append(Message(role=ROLES.get(role, role), content=content))
    return conversation


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, *, where: str) -> str:
    """The conversation as the model sees it, through ``apply_chat_template``.

    Raises:
        CalibrationError: the tokenizer has no template, or the template refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise CalibrationError(
            f"{where}: holds chat conversations but the tokenizer has no chat template; choose a source of "
            "plain text, or name a text column"
        )
    try:
        text = tokenizer.apply_chat_template(list(conversation), tokenize=False)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        roles = [message["role"] for message in conversation]
        raise CalibrationError(
            f"{where}: the chat template refuses a conversation with the roles {roles} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); drop or repair it"
        ) from error
    return str(text)


def _text_of(content: object) -> str | None:
    """Plain text of a message's content, which may be a list of parts; None where a part is no text."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and content and all(isinstance(part, Mapping) for part in content):
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    return None
