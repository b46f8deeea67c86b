"""The route e2b → local, from a program's request to the record: with E2B there, and with E2B gone."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import httpx
from e2b_code_interpreter import Sandbox

from tests.gateway.conftest import options
from tests.product import running_product


def run(http, **asked) -> dict:
    answer = http.post("/api/v1/executions", json=asked)
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_with_e2b_there_code_runs_on_it_and_nothing_is_left_behind(product, template_python):
    e2b = {"E2B_API_KEY": product.key, "E2B_API_URL": f"{product.url}/e2b", "E2B_SANDBOX_URL": f"{product.url}/e2b"}
    with running_product(template_python, **e2b) as front, front.http() as http:
        once = run(http, code="print('hello')\n6 * 7", files={"/tmp/a": "eA=="}, env={"MARK": "1"})
        session = http.post("/api/v1/sessions", json={}).json()
        first = run(http, code="x = 41", session_id=session["id"])
        second = run(http, code="x + 1", session_id=session["id"])
        script = http.put(
            f"/api/v1/sessions/{session['id']}/files",
            params={"path": "/tmp/s.py"},
            content=b"import sys\nprint(sys.argv[1:])",
        )
        scripted = run(http, script_path="/tmp/s.py", args=["a b"], session_id=session["id"])
        slow = run(http, code="import time\ntime.sleep(60)", timeout_seconds=1, session_id=session["id"])
        after = run(http, code="x", session_id=session["id"])
        ended = http.delete(f"/api/v1/sessions/{session['id']}")
        by_sdk = Sandbox.create(timeout=30, **options(front))
        gateways = http.get(f"/api/v1/sessions/sbx_{by_sdk.sandbox_id}").json()
        by_sdk.kill()
        with product.http() as behind:
            there = behind.get("/e2b/v2/sandboxes", headers={"X-API-KEY": product.key}).json()

    assert (once["backend"], once["state"], once["logs"]["stdout"]) == ("e2b", "succeeded", "hello\n")
    assert (once["results"][0]["text/plain"], once["mains"]) == ("42", [True])
    assert (session["backend"], first["state"]) == ("e2b", "succeeded")
    assert second["results"][0]["text/plain"] == "42"
    assert script.status_code == 201
    assert (scripted["state"], scripted["logs"]["stdout"]) == ("succeeded", "['a b']\n")
    assert slow["state"] == "timed_out"
    assert after["results"][0]["text/plain"] == "41"
    assert ended.status_code == 204
    assert gateways["backend"] == "local"  # never again through E2B: an installation may be its own double
    assert [entry for entry in there if "sandgate_sandbox" in entry["metadata"]] == []


def test_with_e2b_gone_the_run_succeeds_on_the_next_backend_and_says_why(template_python):
    gone = {"E2B_API_KEY": "e2b_0123456789abcdef", "E2B_API_URL": "http://127.0.0.1:1"}
    with running_product(template_python, **gone) as product, product.http() as http:
        execution = run(http, code="6 * 7")
        session = http.post("/api/v1/sessions", json={}).json()

    first, second = execution["attempts"]
    assert (first["backend"], first["outcome"], first["code"]) == ("e2b", "unavailable", "backend_unavailable")
    assert "refused" in first["reason"]
    assert "0123456789abcdef" not in json.dumps(execution)
    assert (second["backend"], second["outcome"]) == ("local", "ran")
    assert (execution["state"], execution["backend"], execution["results"][0]["text/plain"]) == (
        "succeeded",
        "local",
        "42",
    )
    assert session["backend"] == "local"


def test_with_a_wildcard_domain_signed_urls_lead_into_the_sandbox(template_python):
    with running_product(template_python, SANDGATE_E2B_DOMAIN="sbx.example.org") as product:
        sandbox = Sandbox.create(timeout=60, **options(product))
        host = sandbox.get_host(49983)
        sandbox.files.write("/home/user/a.txt", "hello")
        signed = urlsplit(sandbox.download_url("/home/user/a.txt", use_signature_expiration=60))
        upload = urlsplit(sandbox.upload_url("/home/user/b.txt"))
        with httpx.Client(base_url=product.url, headers={"Host": host}, trust_env=False) as client:
            got = client.get(f"/files?{signed.query}")
            forged = client.get(f"/files?{signed.query.replace('a.txt', 'b.txt')}")
            put = client.post(f"/files?{upload.query}", files={"file": ("b.txt", b"there")})
            listed = client.get("/sandboxes", headers={"Host": "api.sbx.example.org", "X-API-KEY": product.key})
        back = sandbox.files.read("b.txt")
        sandbox.kill()

    assert host == f"49983-{sandbox.sandbox_id}.sbx.example.org"
    assert (got.status_code, got.text, forged.status_code) == (200, "hello", 401)
    assert (put.status_code, back) == (200, "there")
    assert [entry["sandboxID"] for entry in listed.json()] == [sandbox.sandbox_id]
