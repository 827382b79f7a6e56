"""What /openapi.json says. Out: models of the replies, and each route's bodies, replies and errors.

The models describe; they do not parse: a request's ids go from bytes to an array without an object each.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import BaseModel, Field

from dpq_rec.wire import CODES
from service.http_bodies import ARROW, BINARY, JSON
from service.messages import TableInfo

# Swagger UI as bundled reads OpenAPI 3.0, not the 3.1 that FastAPI writes unless told otherwise.
OPENAPI_VERSION = "3.0.3"
ASSETS = "docs/assets"


class ErrorReply(BaseModel):
    """Every reply that is not 200."""

    error: str = Field(description="What was got and wanted, and what to do")
    error_type: str = Field(description="A name that stays the same, to tell errors apart")


class Health(BaseModel):
    """The worker lives, or is ready."""

    status: str
    version: str


class TablesReply(BaseModel):
    """The tables of the version that is served."""

    version: str
    tables: list[TableInfo]


class LookupReply(BaseModel):
    """Vectors in the order of the ids; zeros where an id is missing."""

    table: str
    version: str
    dim: int
    vectors: list[list[float]]
    missing: list[int] = Field(description="Positions of ids that the vocabulary does not hold")


class MultiLookupReply(BaseModel):
    """Lookups of several tables, all from one version."""

    version: str
    tables: dict[str, LookupReply]


class SearchReply(BaseModel):
    """Answers to each query, the best first; none to an id that is missing."""

    table: str
    version: str
    ids: list[list[int]] | list[list[str]] = Field(
        description="Integers have up to 64 bits, of which JavaScript reads 53: with ids=string they come as strings"
    )
    scores: list[list[float]]
    missing: list[int] = Field(description="Positions of ids that the vocabulary does not hold")


IDS_AS = (
    "How integer ids stand in the reply. JavaScript, this page too, rounds numbers beyond 2^53 and reads strings as "
    "they are"
)
_ERRORS = {
    400: "malformed: the body is no JSON, or no multiple of 8 bytes, or did not arrive",
    401: "unauthorized: no API key, or a wrong one (where the server asks for one)",
    404: "unknown_table, or unknown_ids with missing=error",
    406: "not_acceptable: none of the reply types is accepted",
    413: "too_many_ids, or too_many_bytes",
    415: "unsupported_media_type: of the body; octet-stream for string ids too",
    422: "invalid_request, or wrong_id_type: ids or parameters of the wrong type, or of a name that is not known",
    429: "overloaded: try again later",
    500: "internal: the server's log has more",
    503: "not_ready: still starting",
}
_IDS = {
    "description": "As the table's vocabulary has them: all integers, or all strings. /v1/tables says which",
    "anyOf": [
        {"type": "array", "items": {"type": "integer", "format": "int64"}},
        {"type": "array", "items": {"type": "string"}},
    ],
}
_BAG_LENGTHS = {
    "description": "With pooling: how many ids, in order, each bag has",
    "type": "array",
    "items": {"type": "integer", "minimum": 0},
}
_LOOKUP = {"type": "object", "properties": {"ids": _IDS}, "required": ["ids"], "additionalProperties": False}
_BINARY = {"type": "string", "format": "binary"}
_HEADERS = {
    "X-Num-Rows": ("integer", f"With {BINARY}, {CODES} and {ARROW}"),
    "X-Dim": ("integer", f"With {BINARY}"),
    "X-Dtype": ("string", f"With {BINARY}"),
    "X-Row-Bytes": ("integer", f"With {CODES}"),
    "X-Num-Missing": ("integer", f"With {BINARY}, {CODES} and {ARROW}"),
    "X-Version": ("string", f"With {BINARY}, {CODES} and {ARROW}"),
}

_BINARY_BODY = (
    "Little-endian int64 ids; not for tables of string ids. With pooling, num_bags little-endian uint32 follow: how "
    "many ids, in order, each bag has"
)
LOOKUP_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {
                "schema": {**_LOOKUP, "properties": {"ids": _IDS, "bag_lengths": _BAG_LENGTHS}},
                "examples": {
                    "bags, with pooling": {"value": {"ids": [42, 7, 42], "bag_lengths": [2, 0, 1]}},
                    "integers": {"value": {"ids": [42, 7]}},
                    "strings": {"value": {"ids": ["B00004TKVY", "B00005NIFT"]}},
                },
            },
            BINARY: {"schema": {**_BINARY, "description": _BINARY_BODY}},
        },
    }
}
SEARCH_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {
                "schema": {
                    "type": "object",
                    "description": "Either queries or ids",
                    "properties": {
                        "queries": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
                        "ids": _IDS,
                        "k": {"type": "integer", "minimum": 1, "default": 10},
                        "similarity": {"type": "string", "enum": ["dot", "cosine"], "default": "dot"},
                    },
                    "additionalProperties": False,
                },
                "examples": {
                    "ids": {"value": {"ids": [42], "k": 5, "similarity": "cosine"}},
                    "queries": {"value": {"queries": [[0.1, -0.2, 0.3, 0.4]], "k": 5}},
                },
            }
        },
    }
}
MULTI_LOOKUP_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {
                "schema": {
                    "type": "object",
                    "properties": {"tables": {"type": "object", "additionalProperties": _LOOKUP}},
                    "required": ["tables"],
                    "additionalProperties": False,
                },
                "example": {"tables": {"user_id": {"ids": [1]}, "item_id": {"ids": [42, 7]}}},
            }
        },
    }
}
_FORMS = {
    BINARY: "X-Num-Rows x X-Dim values of X-Dtype, row major, little endian, then X-Num-Missing positions as "
    "little-endian uint32",
    CODES: "X-Num-Rows x X-Row-Bytes bytes of packed codes, zeros where an id is missing, then X-Num-Missing positions "
    "as little-endian uint32; of a table with tiers, then a byte a row: its tier. Not of dense tables or with pooling. "
    "X-Version says which values decode them",
    ARROW: "A stream of one batch: id (int64 or string), vector (fixed_size_list of float or halffloat; null where an "
    "id is missing). Not with pooling. The server needs pyarrow for it",
}
LOOKUP_REPLY: dict[str, Any] = {
    "description": "The vectors, as Accept asks",
    "headers": {name: {"schema": {"type": kind}, "description": text} for name, (kind, text) in _HEADERS.items()},
    "content": {form: {"schema": {**_BINARY, "description": text}} for form, text in _FORMS.items()},
}
VALUES_REPLY: dict[str, Any] = {
    "description": "A safetensors file",
    "headers": {"X-Version": {"schema": {"type": "string"}, "description": "Of the artifact"}},
    "content": {BINARY: {"schema": _BINARY}},
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Status -> its description and model, in the form that FastAPI's `responses` takes."""
    return {status: {"model": ErrorReply, "description": _ERRORS[status]} for status in statuses}


async def docs(request: Request) -> Response:
    """The page that shows it."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="dpq-rec embedding server",
        swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS}/favicon-32x32.png",
    )
