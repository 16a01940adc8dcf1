"""Mutations of the store's objects behind checksums that fit: what a writer with a mistake would leave."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random

import pyarrow.parquet as pq

from tasks.store import thrift
from tasks.store.documents import canonical_text, sha256_text
from tasks.store.schema import sealed

from . import parquet
from .values import Pairs, dumped, mutate_value

DIGEST = "lrpq.sha256"


def mutate_document(raw: bytes, rng: random.Random) -> bytes:
    """A document with a changed body and a checksum that fits.

    Raises:
        ValueError, TypeError, RecursionError: not a document any more, or one that has no checksum.
    """
    document = dict(json.loads(raw, object_pairs_hook=Pairs))
    body = dumped(mutate_value(document["body"], rng))
    content = {**document, "body": json.loads(body)}
    content.pop("sha256")
    checksum = sha256_text(canonical_text(content))
    key, kind = json.dumps(document["key"]), json.dumps(document["kind"])
    return f'{{"body":{body},"key":{key},"kind":{kind},"schema":{document["schema"]},"sha256":"{checksum}"}}'.encode()


def mutate_tensors(raw: bytes, rng: random.Random) -> bytes:
    """Tensors with a changed header; its checksum fits, and those of tensors that still have bytes.

    Raises:
        ValueError, TypeError, RecursionError: not a header any more, or one that has no checksum.
    """
    length = int.from_bytes(raw[:8], "little")
    body = raw[8 + length :]
    header = json.loads(dumped(mutate_value(json.loads(raw[8 : 8 + length], object_pairs_hook=Pairs), rng)))
    metadata = header["__metadata__"]
    for name, entry in header.items():
        if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list) and len(entry["data_offsets"]) == 2:
            begin, end = entry["data_offsets"]
            metadata[f"sha256:{name}"] = hashlib.sha256(body[begin:end]).hexdigest()
    metadata.pop(DIGEST)
    metadata[DIGEST] = sha256_text(canonical_text(header))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def mutate_matrices(raw: bytes, rng: random.Random) -> bytes:
    """Symmetric matrices with a changed index and a checksum that fits; the tiles stay.

    Raises:
        ValueError, TypeError, OSError: not such an object any more.
    """
    footer, start = parquet.read_footer(raw)
    schema = pq.read_schema(io.BytesIO(raw))
    metadata = {key.decode(): text.decode() for key, text in schema.metadata.items() if key.startswith(b"lrpq.")}
    metadata.pop(DIGEST)
    name = rng.choice(("lrpq.matrices", "lrpq.matrices", "lrpq.matrices", "lrpq.rows", "lrpq.units"))
    metadata[name] = dumped(mutate_value(json.loads(metadata[name], object_pairs_hook=Pairs), rng))
    resealed = sealed(schema, metadata)
    changed = {**resealed.metadata, b"ARROW:schema": base64.b64encode(resealed.serialize())}  # where it is read from
    for entry in thrift.field(footer, parquet.KEY_VALUES)[2][1]:
        key, value = thrift.field(entry, 1), thrift.field(entry, 2)
        value[2] = changed.get(key[2], value[2])
    return parquet.with_footer(raw[:start], footer)
