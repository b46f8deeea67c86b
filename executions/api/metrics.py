"""GET /metrics: for Prometheus on this machine without a key, for any other with one."""

from __future__ import annotations

import hmac
import ipaddress

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.http.request import split_domain_port

from executions.api.auth import caller_of
from executions.api.problems import answers
from executions.errors import Invalid
from executions.hop import rows
from executions.keys import bearer
from executions.metrics.page import CONTENT_TYPE, page
from executions.states import Scope

PASSED_ON = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via")


@answers
async def metrics(request: HttpRequest) -> HttpResponse:
    if request.method not in ("GET", "HEAD"):
        raise Invalid("GET only.", field="method")
    text = await rows(_allowed_page, request)
    return HttpResponse(text, content_type=CONTENT_TYPE, headers={"Cache-Control": "no-store"})


def _allowed_page(request: HttpRequest) -> str:
    token, wanted = bearer(request.headers) or "", settings.METRICS_TOKEN
    if wanted and hmac.compare_digest(token.encode(), wanted.encode()):
        return page()
    if token or wanted or not from_this_machine(request):
        caller_of(request).needs(Scope.MANAGE)
    return page()


def from_this_machine(request: HttpRequest) -> bool:
    """Whether a program here asked for itself: over loopback, by a name of loopback, and passed on by no proxy.

    The name matters: a web page in a browser on this machine can have any name lead to 127.0.0.1, but must send it.
    """
    host, _ = split_domain_port(request.META.get("HTTP_HOST", ""))
    passed_on = any(header in request.headers for header in PASSED_ON)
    return not passed_on and _is_loopback(request.META.get("REMOTE_ADDR", "")) and _is_loopback(host)


def _is_loopback(name: str) -> bool:
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
