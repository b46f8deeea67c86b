"""Schemathesis over the whole REST door, in this process: what the schema allows and what it does not, and bodies that are none.

Nothing may answer 5xx, with a status or a type that is not in the schema, or with another shape than the schema says.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import schemathesis
from django.core.wsgi import get_wsgi_application
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
HOSTILE = [  # sent as they are, as JSON
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"code": NaN}', b'{"code": "\\ud800"}',
    b'{"code": "#= 1", "code": 5}', b'{"timeout_seconds": 1e999, "code": "x"}', b'{"code": "\\u0000"}',
    b'{"code": ' + b"9" * 5000 + b"}", b'{"__proto__": {}, "code": "x"}', b'{"executions": [[]]}', b"\x00" * 50,
    b'{"name": "' + b"x" * 70_000 + b'"}', b'{"code": "x", "metadata": {"a\\u0000": "b"}}', b'{"code": true}',
    b'{"code": "x", "files": {"../../etc/passwd": "YQ=="}}', b'{"code": "x", "env": {"A=B": "c"}}', b"-", b'{"": ""}',
]  # fmt: skip


def operations(real: dict[str, str], token: str) -> Iterator[tuple[str, Any]]:
    """(name, strategy of cases) of each operation; path parameters are real ones half of the time."""
    schema = schemathesis.openapi.from_wsgi("/api/schema", get_wsgi_application())
    for found in schema.get_all_operations():
        one = found.ok()
        named = {p.name: real[p.name] for p in one.path_parameters}
        of = [one.as_strategy(mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]
        if named:
            of += [one.as_strategy(GenerationMode.POSITIVE, path_parameters=named)] * 2
        yield one.label, st.one_of(of).map(lambda case: _signed(case, token))


def _signed(case: Case, token: str) -> Case:
    case.headers = {**(case.headers or {}), "Authorization": f"Bearer {token}"}
    return case


def fuzz(strategy: Any, examples: int) -> int:
    """Try so many cases of one operation, always the same ones; how many were sent. Raises what schemathesis found."""
    sent = 0

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def one(case: Case) -> None:
        nonlocal sent
        sent += 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="StreamingHttpResponse must consume")
            case.call_and_validate(checks=CHECKS)

    one()
    return sent
