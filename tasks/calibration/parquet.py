"""Parquet files from outside: what is wrong with their bytes is one error, whatever the parser raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from lrpq.errors import CalibrationError


@contextmanager
def parsing(source: object) -> Iterator[None]:
    """Whatever is raised by bytes that are no sound Parquet becomes one error; what the transport raises passes.

    Raises:
        CalibrationError: naming ``source``.
    """
    try:
        yield
    except MemoryError as error:
        raise CalibrationError(f"{source}: asks for more memory than there is; it is damaged or too large") from error
    except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # pyarrow's own has none
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        reason = "".join(char if char.isprintable() else "?" for char in lines[0])
        raise CalibrationError(f"{source}: not a readable Parquet file ({reason}); write it again") from error
