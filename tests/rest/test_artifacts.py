"""Kept files over REST: whole, in part, never a page that a browser runs; and sessions paused by request."""

import hashlib

import pytest

from executions import operations
from executions.models import Artifact
from executions.serializers import SessionRequest
from tests.plane.conftest import asks

pytestmark = pytest.mark.django_db
CONTENT = bytes(range(256)) * 4000


@pytest.fixture(autouse=True)
def shelf(settings, tmp_path):
    settings.ARTIFACTS_DIR = str(tmp_path / "artifacts")


async def kept(caller, name: str = "a.bin", content: bytes = b"0123456789") -> str:
    session = await operations.open_session(caller=caller, request=SessionRequest())
    path = f"outputs/{name}"
    await operations.put_file(caller=caller, session_id=session.pk, path=path, data=content)
    await operations.end_session(caller=caller, session_id=session.pk)
    return f"/api/v1/artifacts/{(await Artifact.objects.alatest('created_at')).pk}"


async def body(answer) -> bytes:
    return b"".join([piece async for piece in answer.streaming_content])


async def test_a_kept_file_is_streamed_whole_with_its_hash_as_its_tag(call, caller):
    url = await kept(caller, content=CONTENT)

    answer = await call("GET", url)
    again = await call("GET", url, **{"If-None-Match": answer["ETag"]})

    assert (answer.status_code, await body(answer)) == (200, CONTENT)
    assert answer["ETag"] == f'"{hashlib.sha256(CONTENT).hexdigest()}"'
    assert (answer["Content-Length"], answer["Accept-Ranges"]) == (str(len(CONTENT)), "bytes")
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("asked", "status", "expected", "content_range"),
    [
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=4-", 206, b"456789", "bytes 4-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=-0", 416, None, "bytes */10"),
        ("bytes=5-2", 200, b"0123456789", None),
        ("bytes=0-1,4-5", 200, b"0123456789", None),
        ("lines=0-1", 200, b"0123456789", None),
        ("bytes=a-b", 200, b"0123456789", None),
        ("bytes=-", 200, b"0123456789", None),
        ("bytes=" + "9" * 30 + "-", 200, b"0123456789", None),
    ],
)
async def test_a_part_of_it(call, caller, asked, status, expected, content_range):
    answer = await call("GET", await kept(caller), Range=asked)

    assert (answer.status_code, answer.get("Content-Range")) == (status, content_range)
    if expected is not None:
        assert await body(answer) == expected
        assert answer["Content-Length"] == str(len(expected))


async def test_a_part_of_another_version_is_the_whole(call, caller):
    url = await kept(caller)
    tag = (await call("HEAD", url))["ETag"]

    same = await call("GET", url, Range="bytes=0-3", **{"If-Range": tag})
    other = await call("GET", url, Range="bytes=0-3", **{"If-Range": '"other"'})

    assert (same.status_code, other.status_code) == (206, 200)
    assert (await body(same), await body(other)) == (b"0123", b"0123456789")


async def test_head_says_the_size_and_sends_nothing(call, caller):
    answer = await call("HEAD", await kept(caller))

    assert (answer.status_code, answer["Content-Length"], answer.content) == (200, "10", b"")


@pytest.mark.parametrize("name", ["x.html", "x.svg", "x.js", "x.xhtml", "x.xml", "x", "x.pdf", "x.png"])
async def test_no_browser_runs_what_was_kept(call, caller, name):
    answer = await call("GET", await kept(caller, name, b"<script>alert(1)</script>"))

    assert answer["Content-Type"] in ("application/octet-stream", "application/pdf", "image/png")
    assert answer["Content-Disposition"].startswith("attachment; ")
    assert answer["X-Content-Type-Options"] == "nosniff"
    assert answer["Content-Security-Policy"] == "sandbox; default-src 'none'"


async def test_a_name_cannot_write_headers(call, caller):
    url = await kept(caller)
    await Artifact.objects.aupdate(name='outputs/a"\r\nX-Evil: 1\nü.txt')

    answer = await call("GET", url)

    assert answer["Content-Disposition"] == "attachment; filename*=UTF-8''a%22%0D%0AX-Evil%3A%201%0A%C3%BC.txt"
    assert "X-Evil" not in answer


async def test_a_content_that_is_missing_in_the_store_is_404(call, caller, settings):
    url = await kept(caller)
    settings.ARTIFACTS_DIR += "-elsewhere"

    assert (await call("GET", url)).status_code == 404


async def test_what_a_session_and_a_run_have_kept_is_listed(call, caller):
    session = (await call("POST", "/api/v1/sessions", {"keep_files": ["*.csv"]})).json()
    await call("PUT", f"/api/v1/sessions/{session['id']}/files?path=a.csv", raw=b"1")
    await call("DELETE", f"/api/v1/sessions/{session['id']}")
    run = await operations.execute(caller=caller, request=asks(files={"r.txt": "YQ=="}, keep_files=["r.txt"]))

    of_session = (await call("GET", f"/api/v1/sessions/{session['id']}/artifacts")).json()
    of_run = (await call("GET", f"/api/v1/executions/{run.id}/artifacts")).json()
    gone = await call("GET", f"/api/v1/sessions/{session['id']}/files?path=a.csv")

    assert of_session["kept"] == "1 file kept (1 byte)."
    [listed] = of_session["results"]
    assert (listed["name"], listed["size_bytes"], listed["session_id"]) == ("a.csv", 1, session["id"])
    assert [one["execution_id"] for one in of_run["results"]] == [run.id]
    assert await body(await call("GET", listed["url"])) == b"1"
    assert (gone.status_code, gone.json()["artifacts"][0]["id"]) == (410, listed["id"])


@pytest.mark.parametrize("patterns", [["../x"], ["a\u0001"], [""], ["x"] * 17, "outputs", [7]])
async def test_what_is_no_pattern_is_400_by_name(call, patterns):
    answer = await call("POST", "/api/v1/sessions", {"keep_files": patterns})

    assert (answer.status_code, answer.json()["field"].split(".")[0]) == (400, "keep_files")


async def test_a_session_is_paused_and_resumed_by_request(call):
    session = (await call("POST", "/api/v1/sessions", {})).json()
    url = f"/api/v1/sessions/{session['id']}"

    paused = await call("POST", f"{url}/pause")
    run = await call("POST", "/api/v1/executions", {"code": "#> awake", "session_id": session["id"]})
    await call("POST", f"{url}/pause")
    resumed = await call("POST", f"{url}/resume")

    assert (paused.status_code, paused.json()["state"], paused.json()["reserved_usd"]) == (200, "paused", "0")
    assert (run.status_code, run.json()["logs"]["stdout"]) == (201, "awake\n")
    assert (resumed.status_code, resumed.json()["state"]) == (200, "leased")
