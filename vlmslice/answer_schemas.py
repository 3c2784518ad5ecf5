"""JSON schemas of answers: of named fields, from a file, and of a receipt. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmslice.errors import VlmSliceError

FIELD_LENGTH = 150
"""Characters of a field, if nothing else is said; what goes round in circles is stopped soon after."""


class SchemaError(VlmSliceError, ValueError):
    """A JSON schema cannot be read or followed."""


def fields_schema(lengths: Mapping[str, int]) -> dict[str, Any]:
    """The schema of an object of these fields, all of them texts, in this order.

    Args:
        lengths: Most characters of each field. A small model that loses its place in one field would otherwise never
            come to the next.

    Raises:
        SchemaError: There is no field, or one without a name.
    """
    if not lengths or not all(lengths):
        raise SchemaError(f"got the fields {list(lengths)}; expected names, such as date,total")
    return {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": length} for name, length in lengths.items()},
        "required": list(lengths),
        "additionalProperties": False,
    }


def read_answer_schema(fields: str | None, file: Path | None) -> dict[str, Any] | None:
    """The schema that a command was given: as `fields`, "date,total", or in a file; None if it was given neither.

    Raises:
        SchemaError: Both were given, or one that cannot be read.
    """
    if fields is not None and file is not None:
        raise SchemaError(f"got the fields {fields} and the schema in {str(file)!r}; leave one of them out")
    if fields is not None:
        return fields_schema(dict.fromkeys((name.strip() for name in fields.split(",")), FIELD_LENGTH))
    if file is None:
        return None
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SchemaError(
            f"cannot read a JSON schema from {str(file)!r}: {reason}; expected a file such as "
            '{"type": "object", "properties": {"total": {"type": "string"}}}'
        ) from error
    if not isinstance(schema, dict):
        raise SchemaError(
            f"{str(file)!r} holds a {type(schema).__name__}, no JSON schema; expected an object"
        )
    return schema


RECEIPT_SCHEMA = fields_schema({"company": 80, "date": 40, "address": FIELD_LENGTH, "total": 30})
