"""Calibration and evaluation text: from a source the user names to token windows.

sources.py     what ``--calibration`` and ``--evaluation`` accept, parsed
documents.py   a source -> texts or chat conversations, streamed
chat.py        conversations -> text through the model's own template
windows.py     documents -> token windows of one length
token_rows.py  Parquet files that already hold token ids
sampling.py    windows sampled from the model itself
overlap.py     how much of the evaluation text was calibrated on
load.py        one call over all of it
"""

from tasks.calibration.documents import load_documents
from tasks.calibration.load import load_windows
from tasks.calibration.overlap import overlap_warning, share_source
from tasks.calibration.sampling import sample_windows, self_windows
from tasks.calibration.sources import Source, parse_source
from tasks.calibration.windows import Windows, tokenize_windows

__all__ = [
    "Source",
    "Windows",
    "load_documents",
    "load_windows",
    "overlap_warning",
    "parse_source",
    "sample_windows",
    "self_windows",
    "share_source",
    "tokenize_windows",
]
