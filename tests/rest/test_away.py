"""A disk that takes nothing more: whatever has to be written is refused with one code, and what is read is answered."""

import errno
import sqlite3

import pytest
from django.db import OperationalError, connection
from django.test import AsyncClient

from executions import audit

pytestmark = pytest.mark.django_db
WRITES = [
    ("/api/v1/executions", {"code": "#= 1"}),
    ("/api/v1/sessions", {}),
    ("/api/v1/executions/batch", {"executions": [{"code": "#= 1"}]}),
    ("/api/v1/keys", {"name": "another"}),
]


@pytest.fixture
def disk(db):
    """It is full once it was told to be. The rows are on this thread, the tests' own code is not."""
    told = {"full": False}

    def execute(really, sql, params, many, context):
        sql_text = sql.decode() if isinstance(sql, bytes) else sql
        if told["full"] and sql_text.lstrip().upper().startswith(("INSERT", "UPDATE", "DELETE")):
            cause = sqlite3.OperationalError("database or disk is full")
            cause.sqlite_errorname = "SQLITE_FULL"
            raise OperationalError("database or disk is full") from cause
        return really(sql, params, many, context)

    with connection.execute_wrapper(execute):
        yield told
        told["full"] = False


@pytest.mark.parametrize(("path", "body"), WRITES)
async def test_what_has_to_be_written_is_refused_by_name(call, disk, path, body):
    disk["full"] = True

    answer = await call("POST", path, body)

    assert (answer.status_code, answer["Content-Type"]) == (507, "application/problem+json"), answer.content
    assert (answer.json()["code"], answer["Retry-After"]) == ("storage_full", "60")
    assert "no room left" in answer.json()["detail"]


async def test_what_is_read_is_answered(call, disk):
    body = (await call("POST", "/api/v1/executions", {"code": "#= 1"})).json()
    disk["full"] = True

    answer = await call("GET", f"/api/v1/executions/{body['id']}")

    assert answer.json()["state"] == "succeeded"


async def test_what_breaks_while_a_refusal_is_told_is_a_problem_too(monkeypatch):
    def full(error):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(audit, "tells", full)

    answer = await AsyncClient(raise_request_exception=False).get("/api/v1/executions")

    assert (answer.status_code, answer["Content-Type"]) == (507, "application/problem+json"), answer.content
    assert answer.json()["code"] == "storage_full"
