"""Keys change with what makes a result, and with nothing else."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrpq.errors import ConfigError, StoreError
from tasks.store.code import _parse, code_digest
from tasks.store.documents import JSON
from tasks.store.keys import artifact_key, environment_fingerprint

BASE: dict[str, Any] = {
    "inputs": {"tokens": "k1"},
    "parameters": {"damping": 0.01, "bits": [2, 3], "name": None},
    "code": "c",
    "environment": {"torch": "2.13.0"},
}

Values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text().filter(lambda name: not name.startswith("$")), inner, max_size=3)
    ),
    max_leaves=8,
)


def key_of(value: JSON) -> str:
    return artifact_key("stage", inputs={}, parameters={"value": value}, code="", environment={})


def typed_text(value: object) -> str:
    """An independent exact text: floats by their hexadecimal form, mappings sorted."""
    if isinstance(value, float):
        return f"float {value.hex()}"
    if isinstance(value, dict):
        return "dict " + repr(sorted((name, typed_text(item)) for name, item in value.items()))
    if isinstance(value, list):
        return "list " + repr([typed_text(item) for item in value])
    return f"{type(value).__name__} {value!r}"


def test_every_argument_counts() -> None:
    changed = [
        artifact_key("other", **BASE),
        artifact_key("stage", **{**BASE, "inputs": {"tokens": "k2"}}),
        artifact_key("stage", **{**BASE, "parameters": {**BASE["parameters"], "damping": 0.02}}),
        artifact_key("stage", **{**BASE, "code": "d"}),
        artifact_key("stage", **{**BASE, "environment": {"torch": "2.13.1"}}),
        artifact_key("stage", **{**BASE, "inputs": BASE["environment"], "environment": BASE["inputs"]}),
        artifact_key("stage", **BASE),
    ]
    assert len(set(changed)) == len(changed)
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in changed)


def test_a_key_is_the_same_in_every_process_and_release() -> None:
    # A changed text here means that every store in the world starts anew: do it on purpose only.
    text = (
        '{"code":"c","environment":{"torch":"2.13.0"},"format":"lrpq artefact key 1","inputs":{"tokens":"k1"},'
        '"parameters":{"bits":[2,3],"damping":{"$float":"0x1.47ae147ae147bp-7"},"name":null},"stage":"stage"}'
    )
    assert artifact_key("stage", **BASE) == hashlib.sha256(text.encode()).hexdigest()


@given(Values, Values)
def test_keys_are_equal_if_and_only_if_the_parameters_are(a: JSON, b: JSON) -> None:
    assert (key_of(a) == key_of(b)) == (typed_text(a) == typed_text(b))
    assert key_of(a) == key_of(json.loads(json.dumps(a)))


def test_numbers_that_print_alike_make_different_keys() -> None:
    values: list[JSON] = [
        1,
        1.0,
        True,
        "1",
        "1.0",
        0.1 + 0.2,
        0.3,
        0.0,
        -0.0,
        "0x1.0000000000000p+0",
        [1],
        math.nextafter(1.0, 2.0),
    ]
    assert len(set(map(key_of, values))) == len(values)


def test_the_order_of_mappings_does_not_count_and_that_of_lists_does() -> None:
    items: list[tuple[str, JSON]] = [("a", 1), ("b", 2.5), ("c", {"x": 1, "y": 2})]
    assert len({key_of(dict(order)) for order in itertools.permutations(items)}) == 1
    assert key_of([1, 2]) != key_of([2, 1])
    assert key_of((1, 2)) == key_of([1, 2])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"value is nan"),
        ([1.0, math.inf], r"value\[1\] is inf"),
        ({"a": {1: 2}}, r"value\.a has the key 1"),
        (torch.float32, r"value is a dtype"),
        ({"$float": "0x1p+0"}, r"'\$float'"),
        ({1, 2}, r"value is a set"),
    ],
)
def test_what_has_no_exact_text_is_refused(value: JSON, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        key_of(value)


FILES = {
    "__init__.py": "",
    "stage.py": '''
        """Doc."""
        from firstparty.core import gptq
        from .sub import near  # a comment
        import json
        import firstparty.deep.leaf

        def run(x: int) -> int:
            """Doc."""
            from firstparty import lazy
            return gptq.solve(x) + lazy.more(x)
    ''',
    "core/__init__.py": "SHARED = 1",
    "core/gptq.py": "from firstparty.core import grid\nBLOCK = 128\ndef solve(x): return grid.step(x) * BLOCK",
    "core/grid.py": "def step(x): return x + 1",
    "core/unused.py": "VALUE = 1",
    "core/types_only.py": "VALUE = 1",
    "core/dynamic.py": "VALUE = 1",
    "core/star.py": "VALUE = 1",
    "lazy.py": """
        import importlib
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from firstparty.core import types_only

        def more(x):
            return importlib.import_module('firstparty.core.dynamic').VALUE
    """,
    "deep/__init__.py": "VALUE = 1",
    "deep/leaf.py": "VALUE = 1",
    "sub/__init__.py": "from ..core.star import *",
    "sub/near.py": "class A:\n    limit: int = 3\n    'Doc of the field.'",
}  # fmt: skip


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Write one file of a package on the import path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> None:
        path = tmp_path / "firstparty" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    for name, text in FILES.items():
        write(name, text)
    return write


def digest() -> str:
    return code_digest("firstparty.stage", packages=["firstparty"])


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stage.py", "gptq.solve(x) +", "gptq.solve(x) -"),
        ("core/gptq.py", "128", "129"),  # what a stage imports
        ("core/gptq.py", "128", "128.0"),
        ("core/grid.py", "x + 1", "x + 2"),  # what that imports
        ("core/__init__.py", "SHARED = 1", "SHARED = 2"),  # runs before core.gptq
        ("__init__.py", "", "import os"),
        ("lazy.py", "def more(x)", "def more(x, y=0)"),  # imported inside a function
        ("core/dynamic.py", "1", "2"),  # import_module("literal")
        ("deep/__init__.py", "1", "2"),  # runs before deep.leaf, named nowhere
        ("core/star.py", "1", "2"),  # relative, by *
        ("sub/near.py", "3", "4"),  # relative
    ],
)
def test_a_change_of_code_changes_the_digest(edit: Callable[[str, str], None], name: str, old: str, new: str) -> None:
    before = digest()
    assert old in FILES[name]
    edit(name, FILES[name].replace(old, new) if old else new)
    assert digest() != before
    edit(name, FILES[name])
    assert digest() == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stage.py", "# a comment", "# another"),
        ("stage.py", '"""Doc."""', '"""Another, in module and function."""'),
        ("stage.py", "gptq.solve(x) + lazy", "gptq.solve( x )  +  lazy"),
        ("sub/near.py", "Doc of the field.", "Another."),
        ("core/unused.py", "1", "2"),  # nobody imports it
        ("core/types_only.py", "1", "2"),  # never runs
        ("lazy.py", "'firstparty.core.dynamic'", '"firstparty.core.dynamic"'),
    ],
)
def test_a_change_of_text_does_not(edit: Callable[[str, str], None], name: str, old: str, new: str) -> None:
    before = digest()
    changed = FILES[name].replace(old, new)
    assert changed != FILES[name]
    edit(name, changed)
    assert digest() == before


def test_the_packages_around_a_named_module_count(edit: Callable[[str, str], None]) -> None:
    before = code_digest("firstparty.core.unused", packages=["firstparty"])
    edit("core/__init__.py", "SHARED = 2")
    assert code_digest("firstparty.core.unused", packages=["firstparty"]) != before


def test_a_removed_docstring_and_a_string_that_is_used() -> None:
    def parsed(text: str) -> str:
        return _parse(text.encode(), "m", False).digest

    assert parsed("def f():\n    'Doc.'\n    return 1") == parsed("def f():\n    return 1")
    assert parsed("def f():\n    return 'a'") != parsed("def f():\n    return 'b'")
    assert parsed("X = 'a'") != parsed("X = 'b'")
    assert parsed("X = 1") != parsed("X = True")
    assert parsed("X = None") != parsed("X: None")
    assert parsed("f(**a, b=1)") != parsed("f(b=1, **a)")
    assert parsed("X = {1: 2}") != parsed("X = {2: 1}")
    assert parsed("X = {**a, 1: 2}") != parsed("X = {1: 2, **a}")
    assert parsed("if a:\n    b\nelse:\n    c") != parsed("if a:\n    b\n    c")


def test_cycles_end_and_the_order_of_arguments_does_not_count(edit: Callable[[str, str], None]) -> None:
    edit("core/grid.py", "from firstparty import stage")
    one = code_digest("firstparty.stage", "firstparty.lazy", packages=["firstparty"])
    assert one == code_digest("firstparty.lazy", "firstparty.stage", packages=["firstparty"]) == digest()


def test_unknown_modules_and_bad_files_are_named(edit: Callable[[str, str], None]) -> None:
    for name in ["firstparty.nothing", "json", "firstparty.core.grid.step"]:
        with pytest.raises(ConfigError, match=f"no module '{name}'"):
            code_digest(name, packages=["firstparty"])
    edit("core/grid.py", "def (")
    with pytest.raises(ConfigError, match=r"module firstparty\.core\.grid is not Python"):
        digest()


def test_the_real_packages_have_a_digest() -> None:
    assert code_digest("tasks.store.keys") != code_digest("lrpq.notation")


def test_the_fingerprint_names_what_may_change_bytes() -> None:
    found = environment_fingerprint("cpu", threads=2)
    assert found["torch"] == torch.__version__
    assert found["threads"] == "2"
    assert {"lrpq", "transformers", "float32_matmul_precision"} <= found.keys()
    assert torch.backends.cpu.get_cpu_capability() in found["device"]
    assert found == environment_fingerprint(torch.device("cpu"), threads=2)
    assert found != environment_fingerprint("cpu", threads=1)
    assert all(isinstance(text, str) and text for text in found.values())


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(StoreError, match="device meta"):
        environment_fingerprint("meta", threads=1)
