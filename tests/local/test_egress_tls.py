"""From code through the proxy to a TLS server of this machine and back, and what its agent is told of it."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from executions import backends, operations
from executions.states import ExecutionState
from tests.plane.conftest import asks

pytestmark = pytest.mark.django_db(transaction=True)

OUTSIDE = "127.0.0.2"
BODY = b"from the other side of a tunnel\n" * 4096


@dataclass
class Secure:
    port: int
    authority: str  # its certificate, which nobody else knows

    @property
    def url(self) -> str:
        return f"https://{OUTSIDE}:{self.port}/data"


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Secure]:
    """A TLS server with a certificate of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY)

        def log_message(self, *_: object) -> None:
            pass

    certificate = _certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ThreadingHTTPServer((OUTSIDE, 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield Secure(server.server_address[1], certificate.read_text().partition("-----BEGIN PRIVATE")[0])
        finally:
            server.shutdown()
            thread.join()


def _certificate(folder: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "sandgate tests")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(OUTSIDE))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path = folder / "server.pem"
    path.write_bytes(
        signed.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@pytest.fixture
def allowed(caller, node, secure, settings):
    """An agent of the local runtime that may reach the server, which a range of addresses names."""
    settings.SANDBOXES = {
        "local": {"BACKEND": "executions.backends.local.LocalBackend", "OPTIONS": {"RUN_DIR": str(node.run_dir)}}
    }
    backends._live.clear()
    caller.agent.route = ["local"]
    caller.agent.network_allow = [f"127.0.0.2/31:{secure.port}"]
    caller.agent.save()
    return caller


FETCH = """
import ssl, urllib.request, requests
with open('/tmp/ca.pem', 'w') as file:
    file.write({authority!r})
trusting = ssl.create_default_context(cafile='/tmp/ca.pem')
first = urllib.request.urlopen({url!r}, context=trusting, timeout=10).read()
second = requests.get({url!r}, verify='/tmp/ca.pem', timeout=10).content
(len(first), first == second)
"""


async def test_https_through_the_proxy_is_in_the_ledger_with_its_bytes(allowed, secure):
    code = FETCH.format(authority=secure.authority, url=secure.url)

    shape = await operations.execute(caller=allowed, request=asks(code, timeout_seconds=30))

    assert shape.state == ExecutionState.SUCCEEDED, shape.error
    assert shape.results[0]["text/plain"] == f"({len(BODY)}, True)"
    assert [(e.host, e.port, e.address, e.verdict) for e in shape.egress] == [
        (OUTSIDE, secure.port, OUTSIDE, "allowed")
    ] * 2
    assert all(e.bytes_in > len(BODY) and 300 < e.bytes_out < 5000 for e in shape.egress)


async def test_a_certificate_that_the_code_does_not_trust_is_its_own_error(allowed, secure):
    code = f"import urllib.request\nurllib.request.urlopen({secure.url!r}, timeout=10)"

    shape = await operations.execute(caller=allowed, request=asks(code, timeout_seconds=30))

    assert "CERTIFICATE_VERIFY_FAILED" in shape.error.value
    assert shape.detail == ""
    assert [e.verdict for e in shape.egress] == ["allowed"]


@pytest.mark.parametrize(
    "fetch",
    [
        "import urllib.request\nurllib.request.urlopen({url!r}, timeout=10)",
        "import requests\nrequests.get({url!r}, timeout=10)",
    ],
    ids=["urllib", "requests"],
)
async def test_a_denied_host_is_one_sentence_to_the_code_and_to_its_agent(allowed, secure, fetch):
    with socket.create_server((OUTSIDE, 0)) as other:
        port = other.getsockname()[1]
        other.setblocking(False)

        shape = await operations.execute(
            caller=allowed, request=asks(fetch.format(url=f"https://{OUTSIDE}:{port}/"), timeout_seconds=30)
        )

        with pytest.raises(BlockingIOError):
            other.accept()
    sentence = f"agent etl may not reach {OUTSIDE}:{port}; allowed are: 127.0.0.2/31:{secure.port}"
    assert shape.state == ExecutionState.FAILED
    assert sentence in shape.error.value
    assert sentence in shape.detail
    assert [(e.host, e.port, e.verdict, e.bytes_in) for e in shape.egress] == [(OUTSIDE, port, "denied", 0)]
    assert sentence in shape.egress[0].reason
