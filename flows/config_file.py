"""From a file and options to a checked configuration; every mistake becomes one line that names the place."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from flows.config import CompressConfig
from flows.sections import Flag, Section
from lrpq.errors import ConfigError
from tasks.store.documents import parse_object

S = TypeVar("S", bound=Section)
MAX_SHOWN = 60  # characters of a refused value in a message
BUDGETS = ("budget_bits", "budget_bytes", "max_kl")


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> CompressConfig:
    """Read a TOML or JSON file, put the overrides over it and check the whole.

    Args:
        path: the file, or None.
        overrides: nested as the file is, without what was not given. A budget in it replaces the file's, of
            whichever kind.

    Local folders become absolute and the evaluation source is filled in, so that the result means the same
    everywhere. Relative paths in a file are relative to the current folder.

    Raises:
        ConfigError: unreadable, an unknown key (the nearest known one is named), a wrong type, a
            contradiction.
    """
    values = {"run": {}, "plan": {}} | ({} if path is None else read_settings(path))
    plan = values.get("plan")
    if isinstance(plan, dict) and any(key in overrides.get("plan", {}) for key in BUDGETS):
        values["plan"] = {key: value for key, value in plan.items() if key not in BUDGETS}
    config = checked(CompressConfig, _merged(values, overrides), file=path, options=overrides)
    return _resolved(config)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the content of a ``.toml`` or ``.json`` file.

    Raises:
        ConfigError: missing, of another kind, or with a syntax error (where it is).
    """
    readers: dict[str, Callable[[bytes], dict[str, Any]]] = {
        ".toml": lambda raw: tomllib.loads(raw.decode("utf-8")),
        ".json": lambda raw: dict(parse_object(raw)),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"config file {path}: expected a name that ends in .toml or .json")
    try:
        return reader(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"config file {path}: cannot be read ({error.strerror}); check the name") from error
    except (ValueError, RecursionError) as error:  # syntax, encoding, a key twice
        raise ConfigError(f"config file {path}: not valid {path.suffix[1:].upper()} ({_printable(error)})") from error


def checked(
    model: type[S],
    values: Mapping[str, Any],
    *,
    file: Path | None = None,
    options: Mapping[str, Any] | None = None,
    section: Sequence[str] = (),
) -> S:
    """Build a section from plain values.

    Args:
        model: the section's type.
        values: what to build it from.
        file: where the values come from, for messages.
        options: those of the values that were given on the command line: messages name their options.
        section: names of the sections around it, for messages.

    Raises:
        ConfigError: one line for the first mistake, unknown keys first.
    """
    for location in _unknown_keys(model, values):
        place = "" if file is None else f"{file}: "
        raise ConfigError(place + _unknown_key(model, location, section))
    try:
        # As JSON, so that strict means JSON's types: a list is a tuple, a text a path, but "3" is no number.
        text = json.dumps(values, default=str)
    except (ValueError, RecursionError) as error:  # a hexadecimal number of TOML has no limit
        raise ConfigError(f"{file or 'options'}: a number too long or lists too deep ({_printable(error)})") from error
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        if mistakes[0]["type"] == "json_invalid":
            raise ConfigError(f"{file or 'options'}: lists too deep, or text that is no Unicode") from None
        location = tuple(part for part in mistakes[0]["loc"] if isinstance(part, str))
        given = _has(options or {}, location)
        place = "" if file is None or given else f"{file}: "
        more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
        raise ConfigError(place + _wrong_value(model, location, section, dict(mistakes[0]), given) + more) from None


def fields_of(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Yield the path and the description of every field, sections included."""
    for name, field in model.model_fields.items():
        yield (*above, name), field
        if (inner := _section_of(field)) is not None:
            yield from fields_of(inner, (*above, name))


def flag_of(field: FieldInfo) -> Flag | None:
    """Return the field's option on the command line."""
    return next((item for item in field.metadata if isinstance(item, Flag)), None)


def _unknown_keys(
    model: type[BaseModel], values: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """Yield the keys that no field has. Before anything is checked: a misspelt section looks like a missing one."""
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            yield (*above, key)
        elif isinstance(value, Mapping) and (inner := _section_of(field)) is not None:
            yield from _unknown_keys(inner, value, (*above, key))


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _unknown_key(model: type[Section], location: tuple[str, ...], section: Sequence[str]) -> str:
    known = [path for path, _ in fields_of(model)]
    *above, name = location
    siblings = [path[-1] for path in known if list(path[:-1]) == above]
    message = f"unknown key {name!r} {_section_name((*section, *above))}"
    elsewhere = [path for path in known if path[-1] == name]
    if elsewhere:
        homes = " or ".join(_section_name((*section, *path[:-1])) for path in elsewhere)
        return f"{message}; {name!r} belongs {homes}"
    near = difflib.get_close_matches(name, siblings, n=1)
    if near:
        return f"{message}; did you mean {near[0]!r}?"
    far = difflib.get_close_matches(name, [path[-1] for path in known], n=1)
    if far:
        home = next(path for path in known if path[-1] == far[0])
        return f"{message}; did you mean {far[0]!r} {_section_name((*section, *home[:-1]))}?"
    return f"{message}; known there: {', '.join(siblings)}"


def _section_name(section: Sequence[str]) -> str:
    return f"in [{'.'.join(section)}]" if section else "above all sections"


def _wrong_value(
    model: type[Section],
    location: tuple[str, ...],
    section: Sequence[str],
    mistake: dict[str, Any],
    given: bool,
) -> str:
    flag = next((flag_of(field) for path, field in fields_of(model) if path == location), None)
    dotted = ".".join((*section, *location)) or "the file"
    name = flag.name if flag is not None and given else dotted
    if mistake["type"] == "missing":
        how = "" if flag is None else f"give {flag.name} or "
        return f"{dotted} is missing; {how}set it in a config file"
    if mistake["type"] == "value_error":
        return f"{name}: {mistake['ctx']['error']}"
    expected = str(mistake["msg"]).removeprefix("Input should be ").replace("a valid ", "a ").replace("a int", "an int")
    shown = _printable(json.dumps(mistake["input"], ensure_ascii=False, default=str))
    if len(shown) > MAX_SHOWN:
        shown = shown[: MAX_SHOWN - 3] + "..."
    return f"{name}: expected {expected}, got {shown}"


def _merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in overrides.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = _merged(below, value) if both and isinstance(below, Mapping) else value
    return merged


def _has(options: Mapping[str, Any], location: Sequence[str]) -> bool:
    value: Any = options
    for part in location:
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return bool(location)


def _resolved(config: CompressConfig) -> CompressConfig:
    asked = config.run.images
    images = asked.model_copy(update={"source": None if asked.source is None else absolute_model(asked.source)})
    run = config.run.model_copy(
        update={
            "model": absolute_model(config.run.model),
            "images": images,
        }
    )
    source = config.evaluation_source()
    if source is not None and images.source is not None:
        source = absolute_model(source)
    return config.model_copy(
        update={
            "run": run,
            "evaluation": config.evaluation.model_copy(update={"source": source}),
            "output": Path(os.path.abspath(os.path.expanduser(config.output))),  # Path's fails for an unknown user
            "store": absolute_store(config.store),
        }
    )


def _printable(text: object) -> str:
    """Text without line breaks and control characters."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def absolute_model(model: str) -> str:
    """Return an existing folder as an absolute path: a run id must not depend on the current folder."""
    folder = os.path.expanduser(model)
    return os.path.abspath(folder) if os.path.isdir(folder) else model


def absolute_store(store: str) -> str:
    """Return a folder as an absolute path, a URL as it is: workers may have another current folder."""
    return store if not store or "://" in store else os.path.abspath(os.path.expanduser(store))
