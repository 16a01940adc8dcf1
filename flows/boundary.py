"""The edge of the program: any exception becomes one line and an exit code.

0    done
1    a mistake of the program: the traceback goes to a file (or is shown with LRPQ_DEBUG=1)
2    something the user can act upon (LrpqError, or options that cannot be read)
130  interrupted (Ctrl-C)
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows import ctrl_c
from flows.config import cache_folder
from lrpq.errors import ConfigError, LrpqError

EXIT_UNEXPECTED = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130
MAX_CHAIN = 32  # links of a chain of causes that are followed; longer ones are circular

_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_SECRET_PARAMETER = re.compile(
    r"(?i)\b((?:x-amz-)?(?:signature|security-token|credential)|token|password|secret|api_?key)=([^\s&'\",;]+)"
)
_SECRET_NAME = re.compile(r"(?i)token|secret|password|passwd|api_?key|access_key|credential|auth_string")
_MIN_SECRET = 8  # shorter values of the environment are words, not secrets


class Interrupted(Exception):
    """Ctrl-C, after everything has been closed; carries what is needed to continue."""

    def __init__(self, run_id: str | None = None) -> None:
        super().__init__("interrupted")
        self.run_id = run_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What is told about an exception."""

    kind: str
    """Name of the exception's type."""
    message: str
    """One line, without secrets."""
    exit_code: int

    def document(self) -> dict[str, object]:
        """What ``--json`` prints."""
        return {"error": {"type": self.kind, "message": self.message, "exit_code": self.exit_code}}


@contextlib.contextmanager
def resumable(run_id: str | None = None) -> Iterator[None]:
    """Turn Ctrl-C into ``Interrupted``, however deep Prefect or Ray have wrapped it.

    Put around everything a command does: what it opened is closed by then. A library that is interrupted halfway may
    raise something else in its own cleaning up (Prefect: "Task run is not set"), with no link to the interruption:
    after Ctrl-C any error but one the user can act upon is its consequence.
    """
    try:
        with ctrl_c.remembered():
            yield
    except KeyboardInterrupt:
        raise Interrupted(run_id) from None
    except Exception as error:
        if any(isinstance(link, KeyboardInterrupt) for link in causes(error)) or (
            ctrl_c.was_asked() and user_error(error) is None
        ):
            raise Interrupted(run_id) from error
        raise


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the exception and what it was raised from, the origin last.

    Ray's RayTaskError holds the worker's exception in ``cause``; its copy that passes for the original type
    has a whole traceback as its text. Ray is not imported for it.
    """
    link: BaseException | None = error
    for _ in range(MAX_CHAIN):
        if link is None:
            return
        yield link
        inner = getattr(link, "cause", None)
        link = inner if isinstance(inner, BaseException) and inner is not link else link.__cause__


def user_error(error: BaseException) -> LrpqError | None:
    """Return the error a user can act upon; None if it is a mistake of the program.

    The outermost one counts, for it says most about what was being done, unless it is Ray's copy of another.
    """
    for link in causes(error):
        inner = getattr(link, "cause", None)
        if isinstance(link, LrpqError) and not isinstance(inner, BaseException):
            return link
    return None


def describe(error: BaseException, *, argv: Sequence[str]) -> Failure:
    """Say what an exception means to the user; an unexpected one is logged to a file."""
    if isinstance(error, Interrupted):
        return Failure(kind="Interrupted", message=_how_to_continue(error, argv), exit_code=EXIT_INTERRUPTED)
    found = user_error(error)
    if found is not None:
        return Failure(kind=type(found).__name__, message=one_line(str(found)), exit_code=EXIT_USER)
    text = "".join(traceback.format_exception(error))
    where = _log_traceback(text, argv)
    summary = one_line(f"{type(error).__name__}: {error}")
    return Failure(
        kind=type(error).__name__,
        message=f"unexpected {summary} ({where}; LRPQ_DEBUG=1 shows it)",
        exit_code=EXIT_UNEXPECTED,
    )


def one_line(text: str, *, max_chars: int = 1000) -> str:
    """Return the text without line breaks and secrets."""
    line = " ".join(redacted(text).split())
    return line if len(line) <= max_chars else line[: max_chars - 3] + "..."


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the text without credentials in URLs, signed parameters and secrets of the environment."""
    for name, value in environment.items():
        if len(value) >= _MIN_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return _SECRET_PARAMETER.sub(r"\1=***", _CREDENTIALS_IN_URL.sub("***@", text))


def refuse_secrets(*sources: str | None) -> None:
    """Refuse credentials in a text's URL: what was asked for is stored, shown and shipped with the result.

    Raises:
        ConfigError: a source holds a user, a password, a token or a signature.
    """
    for source in sources:
        if source is not None and redacted(source, {}) != source:
            raise ConfigError(
                f"source {redacted(source, {})!r}: its URL holds a secret, which would be stored with the run; "
                "fetch the text to a file, or give credentials through the environment"
            )


def _how_to_continue(error: Interrupted, argv: Sequence[str]) -> str:
    command = list(argv)
    if error.run_id is not None and not any(part.split("=")[0] == "--run-id" for part in command):
        command += ["--run-id", error.run_id]
    kept = "the run is kept" if error.run_id is not None else "what was computed is kept"
    return one_line(f"interrupted; {kept}: continue with `lrpq {shlex.join(command)}`")


def _log_traceback(text: str, argv: Sequence[str]) -> str:
    """Write the traceback to a file of its own; returns where it is, or that it could not be written."""
    folder = cache_folder() / "logs"
    path = folder / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", opener=_private) as file:
            file.write(redacted(f"lrpq {shlex.join(argv)}\n\n{text}"))
    except OSError as error:
        return f"its traceback could not be written to {folder}: {error.strerror}"
    return f"traceback in {path}"


def _private(path: str | Path, flags: int) -> int:
    return os.open(path, flags, 0o600)
