"""Names of the package ``datasets`` for peers that import them at the top and are given tensors.

On a machine without network, ``datasets`` needs pyarrow and pandas, which are larger than all else that a peer needs.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMES = {
    "datasets": (
        *("Dataset", "DatasetDict", "IterableDataset", "Features", "Sequence", "Value"),
        *("concatenate_datasets", "load_dataset", "load_from_disk"),
    ),
    "datasets.formatting": (),
    "datasets.formatting.formatting": ("LazyRow",),
}


def with_datasets_types() -> str:
    """Import ``datasets``; where that fails, put empty types in its place. Says which.

    The types cannot be made: code that needs a real one raises TypeError.
    """
    try:
        importlib.import_module("datasets")
    except ImportError as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == "datasets"]:
            del sys.modules[name]
        for name, types in NAMES.items():
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, loader=None, is_package=True)
            module.__path__ = []
            for type_name in types:
                setattr(module, type_name, type(type_name, (), {"__new__": _refuse}))
            sys.modules[name] = module
        return f"types only ({error})"
    return "installed"


def _refuse(cls: type, *arguments: object, **options: object) -> None:
    raise TypeError(f"datasets.{cls.__name__}: the package is not installed")
