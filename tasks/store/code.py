"""A digest of code as the interpreter sees it: syntax trees without comments and docstrings.

Imports are followed statically, so nothing is executed: ``import`` statements anywhere, also inside
functions, and ``import_module("literal")``. A module name that is computed is not seen. Bodies of ``if
TYPE_CHECKING:`` are not followed: they never run.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lrpq.errors import ConfigError

FIRST_PARTY = ("lrpq", "tasks")
"""Packages whose code makes results; flows only call it. Other packages count by their versions."""


def code_digest(*modules: str, packages: Sequence[str] = FIRST_PARTY) -> str:
    """SHA-256, hexadecimal, over the named modules and all they import from ``packages``, transitively.

    Importing ``a.b.c`` runs ``a`` and ``a.b`` first, so these count too. The files are read at every call;
    only what was parsed is cached.

    Raises:
        ConfigError: a named module that is in none of the packages, or a file that is not Python.
    """
    parsed: dict[str, _Module] = {}
    looked_at: set[str] = set()  # most names are imported many times over, and attributes are no files
    pending = [name for module in modules for name in _with_parents(module)]
    while pending:
        name = pending.pop()
        if name in looked_at or name.partition(".")[0] not in packages:
            continue
        looked_at.add(name)
        path = _file_of(name)
        if path is None:  # an attribute: `from lrpq.errors import StoreError`
            continue
        parsed[name] = _parse(path.read_bytes(), name, path.name == "__init__.py")
        pending += [part for imported in parsed[name].imports for part in _with_parents(imported)]
    if missing := [name for name in modules if name not in parsed]:
        raise ConfigError(f"no module {missing[0]!r} in {', '.join(packages)}: the code of a stage must be one of them")
    digest = hashlib.sha256()
    for name in sorted(parsed):
        digest.update(f"{name} {parsed[name].digest}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    digest: str
    imports: frozenset[str]
    """Absolute dotted names; some are attributes and not modules."""


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _file_of(name: str) -> Path | None:
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)  # of a top-level name: imports nothing
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder).joinpath(*rest)
        for candidate in (path / "__init__.py", path.with_name(path.name + ".py")):
            if candidate.is_file() and (rest or candidate.name == "__init__.py"):
                return candidate
    return None


@lru_cache(maxsize=1024)
def _parse(source: bytes, name: str, is_package: bool) -> _Module:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"module {name} is not Python: {error}") from None
    package = name if is_package else name.rpartition(".")[0]
    pieces: list[str] = []
    _dump(tree, pieces)
    digest = hashlib.sha256("".join(pieces).encode("utf-8", errors="surrogatepass"))
    return _Module(digest=digest.hexdigest(), imports=frozenset(_imports(tree, package)))


def _dump(node: object, pieces: list[str]) -> None:
    """Add the text of a syntax tree.

    Unlike ast.dump it leaves out empty fields, which come and go with Python versions, and strings that stand
    as statements: docstrings of modules, classes, functions and fields.
    """
    if isinstance(node, ast.Constant):
        # Type and repr tell 1, 1.0 and True apart; the kind (the u of u"text") changes nothing.
        pieces.append(f"{type(node.value).__name__}:{node.value!r}")
    elif isinstance(node, ast.AST):
        pieces.append(f"{type(node).__name__}(")
        for name, value in ast.iter_fields(node):
            if value is not None and value != []:
                pieces.append(f"{name}=")
                _dump(value, pieces)
                pieces.append(",")
        pieces.append(")")
    elif isinstance(node, list):
        pieces.append("[")
        for item in node:
            if not _is_docstring(item):
                _dump(item, pieces)
                pieces.append(",")
        pieces.append("]")
    else:
        pieces.append(repr(node))


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _imports(node: ast.AST, package: str) -> Iterator[str]:
    match node:
        case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING"), orelse=orelse):
            for statement in orelse:
                yield from _imports(statement, package)
            return
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            base = _absolute(module or "", level or 0, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in names if alias.name != "*")
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            yield name
        case _:
            pass
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, package)


def _absolute(module: str, level: int, package: str) -> str:
    if not level:
        return module
    parts = package.split(".")
    kept = parts[: len(parts) - level + 1]
    return ".".join([*kept, module] if module else kept)
