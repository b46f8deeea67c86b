"""People's clients sign in by OAuth: the official client goes the whole way, from a 401 to its first run."""

from __future__ import annotations

import contextlib
import html
import re
import subprocess
import sys
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2
import pytest
from mcp import Client
from mcp.client.auth import AuthorizationCodeResult, OAuthClientProvider
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import OAuthClientMetadata

from tests import servers
from tests.mcp_door.conftest import text
from tests.product import HOME, environment

pytest.importorskip("allauth", reason="django-allauth is not installed: requirements.txt has it")
CALLBACK = "http://127.0.0.1:7999/callback"
PREPARE = """
import django; django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from executions import keys, operations
from executions.models import Membership, Team, User
operations.seed()
team = Team.objects.create(name="Engines")
ada = User.objects.create_superuser("ada", "ada@example.org", "correct horse")
Membership.objects.create(team=team, user=ada, role="developer")
agent = keys.personal_agent(ada, team)
agent.isolation_floor, agent.route = "none", ["scripted"]
agent.save()
"""
REVOKE = """
import django; django.setup()
from django.test import Client
from django.urls import reverse
from executions.models import ApiKey, Execution, User
key = ApiKey.objects.get(name__startswith="OAuth:")
run = Execution.objects.get()
print(key.name, key.agent.person.username, run.key_id == key.pk, run.actor.username, run.agent_id == key.agent_id)
key.revoked_at = key.created_at; key.save()
"""
LINK = "import django; django.setup(); from executions import keys; from executions.models import User; print(keys.make_sign_in_link(User.objects.get()))"


class Kept:
    """What a client remembers."""

    def __init__(self) -> None:
        self.tokens = self.client = None

    async def get_tokens(self):
        return self.tokens

    async def set_tokens(self, tokens):
        self.tokens = tokens

    async def get_client_info(self):
        return self.client

    async def set_client_info(self, client):
        self.client = client


@pytest.fixture(scope="module")
def served():
    """(url, environment) of a server with OAuth and registration switched on."""
    with servers.folder() as data:
        port = servers.free_port()
        on = {"SANDGATE_OAUTH": "1", "SANDGATE_OAUTH_REGISTRATION": "1", "SANDGATE_SCRIPTED": "1"}
        names = environment(data, port, None, DJANGO_SETTINGS_MODULE="config.settings", **on)
        run(names, PREPARE)
        argv = [sys.executable, "-m", "uvicorn", "config.asgi:application", "--port", str(port)]
        with servers.running(argv, ready="running on", cwd=HOME, env=names):
            yield f"http://127.0.0.1:{port}", names


def run(names: dict[str, str], program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=HOME, env=names, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Browser:
    """A person's browser: it follows where the client sends it, signs in by a link, and answers the question."""

    def __init__(self, url: str, names: dict[str, str], answer: str = "grant") -> None:
        self.http = httpx2.AsyncClient(base_url=url, follow_redirects=False, trust_env=False)
        self.names, self.answer, self.page, self.came = names, answer, "", {}

    async def __aenter__(self) -> Browser:
        return self

    async def __aexit__(self, *failed: object) -> None:
        await self.http.aclose()

    async def go(self, url: str) -> None:
        asked = await self.http.get(url)
        while asked.is_redirect:  # to the page that says how to sign in, which remembers where to go on
            await self.http.get(asked.headers["Location"])
            asked = await self.http.get((await self.http.get(run(self.names, LINK))).headers["Location"])
        assert asked.status_code == 200, asked.text
        self.page, self.policy = asked.text, asked.headers["Content-Security-Policy"]
        fields = re.findall(r'name="(\w+)" value="([^"]*)"', self.page)
        form = [(name, html.unescape(value)) for name, value in fields if name != "action"] + [("action", self.answer)]
        went = await self.http.post("/oauth/authorize", content=urlencode(form), headers=FORM)
        self.came = {name: values[0] for name, values in parse_qs(urlsplit(went.headers["Location"]).query).items()}

    async def back(self) -> AuthorizationCodeResult:
        return AuthorizationCodeResult(code=self.came.get("code", ""), state=self.came.get("state"), iss=None)


FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@contextlib.asynccontextmanager
async def connected(url: str, browser: Browser, kept: Kept):
    about = OAuthClientMetadata(client_name="Chat 3", redirect_uris=[CALLBACK], token_endpoint_auth_method="none")
    auth = OAuthClientProvider(url + "/mcp", about, kept, browser.go, browser.back)
    async with httpx2.AsyncClient(auth=auth, timeout=30, trust_env=False) as http:
        async with Client(streamable_http_client(url + "/mcp", http_client=http)) as mcp:
            yield mcp


async def test_a_client_signs_its_person_in_acts_as_their_agent_and_is_revoked_in_the_admin(served):
    url, names = served
    kept = Kept()

    async with Browser(url, names) as browser, connected(url, browser, kept) as mcp:
        ran = await mcp.call_tool("execute_code", {"code": "#= 42", "keep_session": False})
    said = run(names, REVOKE)
    async with httpx2.AsyncClient(trust_env=False) as http:
        headers = {"Authorization": f"Bearer {kept.tokens.access_token}"}
        revoked = await http.post(url + "/mcp", json=CALL, headers=headers)
        rest = await http.get(url + "/api/v1/executions", headers=headers)

    assert "value: 42" in text(ran)
    assert "run code, install packages" in browser.page
    assert "127.0.0.1:7999" in browser.page
    assert "form-action 'self' http://127.0.0.1:7999" in browser.policy
    assert kept.tokens.refresh_token
    assert said == "OAuth: Chat 3 ada True ada True"
    assert revoked.status_code == 401
    assert "This client's access was revoked" in revoked.json()["detail"]
    assert 'error="invalid_token", resource_metadata="' in revoked.headers["WWW-Authenticate"]
    assert rest.status_code == 401  # the token is for MCP alone


CALL = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}


async def test_without_a_token_a_client_is_told_where_to_get_one(served):
    url, _ = served

    async with httpx2.AsyncClient(trust_env=False) as http:
        refused = await http.post(url + "/mcp", json=CALL)
        where = re.fullmatch(r'Bearer resource_metadata="(.*)"', refused.headers["WWW-Authenticate"])[1]
        resource = (await http.get(where)).json()
        server = (
            await http.get(resource["authorization_servers"][0] + "/.well-known/oauth-authorization-server")
        ).json()

    assert resource["resource"] == url + "/mcp"
    assert server["issuer"] == url
    assert server["code_challenge_methods_supported"] == ["S256"]


@pytest.mark.parametrize(
    "asked",
    [
        {"redirect_uris": ["javascript:alert(1)"]},
        {"redirect_uris": ["http://evil.example/"]},
        {"redirect_uris": [CALLBACK], "grant_types": ["client_credentials"]},
        {"redirect_uris": []},
        [],
    ],
)
async def test_what_no_client_needs_is_not_registered(served, asked):
    url, _ = served

    async with httpx2.AsyncClient(trust_env=False) as http:
        refused = await http.post(url + "/oauth/register", json=asked)

    assert refused.status_code == 400
    assert refused.json()["error"].startswith("invalid_")


async def test_a_request_without_pkce_and_a_no_give_nothing(served):
    url, names = served
    async with Browser(url, names, answer="cancel") as browser, httpx2.AsyncClient(trust_env=False) as http:
        about = {"client_name": "Old", "redirect_uris": [CALLBACK], "token_endpoint_auth_method": "none"}
        client = (await http.post(url + "/oauth/register", json=about)).json()["client_id"]
        asked = {"response_type": "code", "client_id": client, "redirect_uri": CALLBACK, "state": "s"}
        old = await http.get(f"{url}/oauth/authorize?{urlencode(asked)}")
        pkce = {"code_challenge": "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM", "code_challenge_method": "S256"}
        await browser.go(f"{url}/oauth/authorize?{urlencode(asked | pkce)}")

    assert old.status_code == 400
    assert "PKCE" in old.text
    assert browser.came == {"error": "access_denied", "state": "s"}


def test_nothing_of_it_is_there_unless_it_is_switched_on(db, client):
    for path in ("/.well-known/oauth-protected-resource", "/oauth/authorize", "/oauth/register"):
        assert client.get(path, headers={"Host": "127.0.0.1"}).status_code == 404
