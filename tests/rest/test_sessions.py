"""Contexts, commands, files and folders of a session, and sandboxes as such."""

import io
import tarfile

import pytest

from executions import operations
from executions.backends.base import Backend
from executions.backends.scripted import ScriptedBackend
from executions.models import Execution, Pool
from executions.operations import replenish

pytestmark = pytest.mark.django_db
RUN = "/api/v1/executions"


@pytest.fixture
def session(call):
    async def opened() -> str:
        return f"/api/v1/sessions/{(await call('POST', '/api/v1/sessions', {})).json()['id']}"

    return opened


async def content(answer) -> bytes:
    return b"".join([piece async for piece in answer.streaming_content])


async def test_a_context_counts_for_itself_until_it_is_removed(call, session):
    where = await session()
    made = await call("POST", f"{where}/contexts", {"language": "python"})
    context = made.json()["id"]
    run = {"code": "#= 1", "session_id": where.rsplit("/", 1)[1]}
    counts = [
        (await call("POST", RUN, run | more)).json()["execution_count"]
        for more in ({}, {"context_id": context}, {"context_id": context})
    ]

    assert (made.status_code, counts) == (201, [1, 1, 2])
    assert [one["id"] for one in (await call("GET", f"{where}/contexts")).json()["results"]] == [context]
    assert (await call("POST", f"{where}/contexts/{context}/restart")).status_code == 204
    assert (await call("POST", RUN, run | {"context_id": context})).json()["execution_count"] == 1
    assert (await call("DELETE", f"{where}/contexts/{context}")).status_code == 204
    gone = await call("DELETE", f"{where}/contexts/{context}")
    assert (gone.status_code, gone.json()["code"]) == (404, "context_unknown")
    assert (await call("POST", f"{where}/contexts", {"language": "cobol"})).status_code == 400


async def test_a_context_asked_for_twice_under_one_idempotency_key_is_one(call, session):
    where = await session()
    one = await call("POST", f"{where}/contexts", {}, **{"Idempotency-Key": "c"})
    two = await call("POST", f"{where}/contexts", {}, **{"Idempotency-Key": "c"})

    assert one.json() == two.json()
    assert len((await call("GET", f"{where}/contexts")).json()["results"]) == 1


async def test_a_command_is_an_execution_with_output_and_exit_code(call, session):
    where = await session()
    good = await call("POST", f"{where}/commands", {"command": "echo #> hi"}, **{"Idempotency-Key": "c"})
    again = await call("POST", f"{where}/commands", {"command": "echo #> hi"}, **{"Idempotency-Key": "c"})
    bad = await call("POST", f"{where}/commands", {"command": "#! Boom: x"})

    assert good.status_code == 201
    assert (good.json()["logs"]["stdout"], good.json()["exit_code"], good.json()["language"]) == ("hi\n", 0, "bash")
    assert again.json()["id"] == good.json()["id"]
    assert (bad.json()["state"], bad.json()["exit_code"]) == ("failed", 1)
    assert await Execution.objects.acount() == 2


async def test_files_are_moved_read_in_part_and_found_by_size(call, session):
    files = f"{await session()}/files"
    await call("PUT", f"{files}?path=a.txt", raw=b"0123456789")
    moved = await call("POST", f"{files}?path=a.txt", {"move_to": "b/c.txt"})

    assert (moved.status_code, (await call("GET", f"{files}?path=a.txt")).status_code) == (200, 404)
    size = await call("HEAD", f"{files}?path=b/c.txt")
    assert (size["Content-Length"], size["Accept-Ranges"]) == ("10", "bytes")
    part = await call("GET", f"{files}?path=b/c.txt", Range="bytes=3-5")
    assert (part.status_code, part["Content-Range"], await content(part)) == (206, "bytes 3-5/10", b"345")
    rest = await call("GET", f"{files}?path=b/c.txt", Range="bytes=7-")
    assert await content(rest) == b"789"
    assert (await call("GET", f"{files}?path=b/c.txt", Range="bytes=10-")).status_code == 416
    assert (await call("POST", f"{files}?path=none", {"move_to": "x"})).status_code == 404


async def test_a_folder_comes_as_a_tar(call, session):
    files = f"{await session()}/files"
    told = {"a.txt": b"a" * 1000, "deep/b.txt": b"b", "deep/" + "long" * 40 + ".txt": "имя".encode(), "empty": b""}
    for name, body in told.items():
        await call("PUT", f"{files}?path=/home/user/data/{name}", raw=body)
    answer = await call("GET", f"{files}?path=data&archive=tar")

    with tarfile.open(fileobj=io.BytesIO(await content(answer))) as archive:
        found = {one.name: archive.extractfile(one).read() for one in archive if one.isfile()}
        assert [one.name for one in archive if one.isdir()] == ["deep"]
    assert answer["Content-Type"] == "application/x-tar"
    assert found == told
    assert (await call("GET", f"{files}?path=data&archive=zip")).status_code == 400
    assert (await call("GET", f"{files}?path=nowhere&archive=tar")).status_code == 404


async def test_parts_and_archives_need_a_sandbox_that_runs_commands(call, session):
    files = f"{await session()}/files"
    for query in ("path=a&offset=0", "path=a&archive=tar"):
        answer = await call("PUT", f"{files}?{query}", raw=b"x")
        assert (answer.status_code, answer.json()["code"]) == (400, "unsupported")
    assert (await call("PUT", f"{files}?path=a&offset=x", raw=b"x")).json()["field"] == "offset"


async def test_an_upload_beyond_the_most_is_refused_also_without_its_length(call, session, settings):
    settings.FILE_MAX_BYTES = 10
    files = f"{await session()}/files"
    answer = await call("PUT", f"{files}?path=a", raw=b"x" * 11)

    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


async def test_a_sandbox_is_listed_looked_at_and_ended_with_what_runs_in_it(call):
    body = (await call("POST", RUN, {"code": "#~ 30"}, Prefer="respond-async")).json()
    listed = (await call("GET", "/api/v1/sandboxes?open=true")).json()["results"]
    where = f"/api/v1/sandboxes/{body['sandbox_id']}"

    assert [one["id"] for one in listed] == [body["sandbox_id"]]
    assert (await call("GET", where)).json()["is_session"] is False
    ended = await call("DELETE", where)
    assert (ended.status_code, (await call("DELETE", where)).status_code) == (202, 202)
    execution = await Execution.objects.aget(pk=body["id"])
    assert (await operations.wait(execution, 10)).state == "cancelled"
    assert (await call("GET", where)).json()["end_reason"] in ("killed", "finished")


async def test_a_method_that_an_address_does_not_have_is_405_with_those_that_it_has(call, session):
    where = await session()
    answer = await call("PATCH", where)

    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert answer["Allow"] == "DELETE, GET, HEAD, OPTIONS"
    assert (await call("OPTIONS", where)).status_code == 204


async def test_a_capability_that_fails_midway_is_told(call, session, monkeypatch):
    monkeypatch.setattr(ScriptedBackend, "move_file", Backend.move_file)
    answer = await call("POST", f"{await session()}/files?path=a", {"move_to": "b"})

    assert (answer.status_code, answer.json()["code"]) == (400, "unsupported")


async def test_two_fresh_calls_get_different_sandboxes_the_second_from_the_pool(call, seeded):
    first = (await call("POST", RUN, {"code": "#= 1"})).json()
    await Pool.objects.acreate(backend="first", template=seeded, target=1)
    for _ in range(3):
        await replenish.replenish()
        await replenish.settled()
    second = (await call("POST", RUN, {"code": "#= 1"})).json()

    assert (first["from_pool"], second["from_pool"]) == (False, True)
    assert first["sandbox_id"] != second["sandbox_id"]
    assert (first["state"], second["state"]) == ("succeeded", "succeeded")
