"""The OpenAPI 3.1 document, made of the addresses in urls.py and of what each view says of itself (operation.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from http import HTTPStatus
from itertools import chain
from typing import Any

from django.http import HttpRequest, HttpResponse
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from executions.api.operation import Many, Operation

ALWAYS = (400, 401, 403, 404, 405, 429)  # what any address may answer beside what it is for
WRITES = ("POST", "PUT", "PATCH", "DELETE")
PARAMETER = re.compile(r"<(?:(\w+):)?(\w+)>")
ABOUT = """Run the code that agents write: on E2B, or on the local runtime.

Every answer has a `Request-Id`. Errors are `application/problem+json`: match on `code`. `Idempotency-Key` makes the repetition of a
write safe. `traceparent` (W3C) is stored with what is run and answered with a span of ours."""


class Problem(BaseModel):
    """What went wrong (RFC 9457): `code` is stable, `detail` is for people, `remedy` says what to do."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    code: str
    detail: str
    remedy: str
    request_id: str
    field: str | None = Field(None, description="Of the request, where one is at fault.")
    retry_after: int | None = Field(None, description="Seconds; also in the header Retry-After.")


@cache
def document() -> dict[str, Any]:
    """The whole of it, as JSON can hold it."""
    found = list(_operations())
    models = {(model, mode) for _, _, one in found for model, mode in _models(one)} | {(Problem, "serialization")}
    references, defined = models_json_schema(
        sorted(models, key=lambda m: (m[0].__name__, m[1])),  # type: ignore[arg-type]
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, dict[str, Any]] = {}
    for address, method, one in found:
        paths.setdefault(address, {})[method.lower()] = _described(address, method, one, references)
    headers = {
        "Request-Id": {"description": "Of this request; logs have it too.", "schema": {"type": "string"}},
        "Retry-After": {
            "description": "Seconds to wait before it is worth trying again.",
            "schema": {"type": "integer"},
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Sandgate", "version": "1", "description": ABOUT, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "tags": [{"name": tag} for tag in sorted({_tag(address) for address in paths})],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": defined["$defs"],
            "headers": headers,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "bearerFormat": "sg_…"}},
        },
    }  # fmt: skip


def text() -> str:
    """As it is committed in docs/openapi.json."""
    return json.dumps(document(), indent=1, ensure_ascii=False, sort_keys=False) + "\n"


async def schema(request: HttpRequest) -> HttpResponse:
    return HttpResponse(text(), content_type="application/vnd.oai.openapi+json")


def _operations() -> Iterator[tuple[str, str, Operation]]:
    """(address, method, what it says) of every address below /api/v1."""
    from executions.api.urls import urlpatterns

    for pattern in urlpatterns:
        for method, view in getattr(pattern.callback, "views", {}).items():
            yield "/" + PARAMETER.sub(r"{\2}", str(pattern.pattern)), method, view.operation


def _models(one: Operation) -> Iterator[tuple[type[BaseModel], str]]:
    if isinstance(one.body, type):
        yield one.body, "validation"
    for given in chain.from_iterable(map(_alternatives, one.gives.values())):
        shape = given.shape if isinstance(given, Many) else given
        if isinstance(shape, type) and issubclass(shape, BaseModel):
            yield shape, "serialization"


def _alternatives(given: Any) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else (given,)


def _described(address: str, method: str, one: Operation, references: dict[Any, Any]) -> dict[str, Any]:
    tag = _tag(address)
    said: dict[str, Any] = {
        "tags": [tag],
        "operationId": "_".join([method.lower(), *re.findall(r"\w+", address.removeprefix("/api/v1/"))]),
        "summary": one.summary,
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in _names(address)),
            *(_parameter(name, "query", schema) for name, schema in (one.query or {}).items()),
            *(_parameter(name, "header", {"type": "string", "description": about}) for name, about in _headers(method, one)),
        ],
    }  # fmt: skip
    if one.body is not None:
        whole = (
            {"type": "string", "format": "binary"} if isinstance(one.body, str) else references[one.body, "validation"]
        )
        kind = one.body if isinstance(one.body, str) else "application/json"
        said["requestBody"] = {"required": True, "content": {kind: {"schema": whole}}}
    responses: dict[str, Any] = {}
    for status, given in one.gives.items():
        responses[str(status)] = _answer(status, given, references)
    for status in sorted({*ALWAYS, *one.fails}):
        responses.setdefault(str(status), _problem(status, references))
    return said | {"responses": dict(sorted(responses.items()))}


def _tag(address: str) -> str:
    return address.removeprefix("/api/v1/").partition("/")[0]


def _names(address: str) -> list[str]:
    return re.findall(r"{(\w+)}", address)


def _headers(method: str, one: Operation) -> list[tuple[str, str]]:
    """Those of this address, and those of all."""
    of_writes = [("Idempotency-Key", "Repeated with the same request, nothing is done twice.")]
    trace = [("traceparent", "W3C trace context: stored with what is run, and answered.")]
    return [*(one.headers or {}).items(), *(of_writes if method in WRITES else []), *trace]


def _parameter(name: str, place: str, schema: dict[str, Any]) -> dict[str, Any]:
    schema = dict(schema)
    about, required = schema.pop("description", ""), schema.pop("required", False)
    said = {"name": name, "in": place, "required": required, "schema": schema}
    return said | ({"description": about} if about else {})


def _answer(status: int, given: Any, references: dict[Any, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {"description": HTTPStatus(status).phrase, "headers": _header("Request-Id")}
    if given is None:
        return said
    content: dict[str, Any] = {}
    for one in _alternatives(given):
        content |= _content(one, references)
    return said | {"content": content}


def _content(given: Any, references: dict[Any, Any]) -> dict[str, Any]:
    """The schema of an answer by its media type."""
    match given:
        case "*/*" | "text/event-stream":  # also a file that is JSON; and some take it for the schema of one event
            return {given: {"schema": {}}}
        case str():
            return {given: {"schema": {"type": "string"} | ({} if given.startswith("text/") else {"format": "binary"})}}
        case Many(shape=shape, paged=paged):
            one = references[shape, "serialization"] if shape else {"type": "object"}
            fields: dict[str, Any] = {"results": {"type": "array", "items": one}}
            if paged:
                fields["next"] = {"type": ["string", "null"], "format": "uri"}
            return {"application/json": {"schema": {"type": "object", "properties": fields, "required": ["results"]}}}
        case _:
            whole = {"type": "object"} if given is dict else references[given, "serialization"]
            return {"application/json": {"schema": whole}}


def _problem(status: int, references: dict[Any, Any]) -> dict[str, Any]:
    headers = _header("Request-Id") | (_header("Retry-After") if status in (409, 429, 503) else {})
    content = {"application/problem+json": {"schema": references[Problem, "serialization"]}}
    return {"description": HTTPStatus(status).phrase, "headers": headers, "content": content}


def _header(name: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"}}
