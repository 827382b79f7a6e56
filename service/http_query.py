"""Queries of the HTTP API: the types of parameters, and that nothing else is given."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query, Request
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from starlette.types import ASGIApp, Receive, Scope, Send

from service import http_schema
from service.errors import InvalidRequestError
from service.http_format import OCTETS

NumBags = Annotated[
    Annotated[int, Field(ge=0, le=10**9 - 1)] | SkipJsonSchema[None],  # OpenAPI 3.0 has no null
    Query(description=f"With pooling, how many lengths follow the ids in {OCTETS}"),
]
IdsAs = Annotated[
    Literal["number", "string"],
    # /docs is JavaScript: its form begins with the value that it shows unchanged.
    Query(description=http_schema.IDS_AS, openapi_examples={"exact in JavaScript": {"value": "string"}}),
]
_SHOWN = 64  # characters of a parameter's name


async def check_query(request: Request) -> None:
    """A mistyped parameter would otherwise do nothing, and of two of one name one would.

    Raises:
        InvalidRequestError: the query has a parameter that the route does not, or one twice.
    """
    names = [name for name, _ in request.query_params.multi_items()]
    if not names:
        return
    dependant = getattr(request.scope.get("route"), "dependant", None)
    known = [] if dependant is None else [parameter.alias for parameter in dependant.query_params]
    for name in names:
        if name not in known:
            wanted = f"some of {', '.join(known)}" if known else "none here"
            raise InvalidRequestError(f"query: got the parameter {name[:_SHOWN]!r}, want {wanted}")
        if names.count(name) > 1:
            raise InvalidRequestError(f"{name}: got it {names.count(name)} times in the query, want it once")


def with_query_check(app: ASGIApp) -> ASGIApp:
    """A route of Starlette's, which takes no parameters."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        await check_query(Request(scope))
        await app(scope, receive, send)

    return checked
