"""What stands before every request. The parts for people (session, CSRF, messages) skip what programs call:
they cost a fifth to two fifths of a request and mean nothing there."""

from __future__ import annotations

import secrets
from typing import Any

import structlog
from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from csp.middleware import CSPMiddleware
from django.conf import settings
from django.contrib.auth.middleware import AuthenticationMiddleware
from django.contrib.messages.middleware import MessageMiddleware
from django.contrib.sessions.middleware import SessionMiddleware
from django.core.exceptions import PermissionDenied
from django.middleware.clickjacking import XFrameOptionsMiddleware
from django.middleware.common import CommonMiddleware
from django.middleware.csrf import CsrfViewMiddleware
from django.middleware.security import SecurityMiddleware
from django.utils.decorators import sync_and_async_middleware

from executions import traces


def new_request_id() -> str:
    return "req_" + secrets.token_hex(10)


@sync_and_async_middleware
def request_id(get_response):
    """Give each request an id, in its answer and in every log line that it causes."""
    if iscoroutinefunction(get_response):

        async def aware(request):
            request.id = new_request_id()
            structlog.contextvars.bind_contextvars(request_id=request.id)
            try:
                response = await get_response(request)
            finally:
                structlog.contextvars.unbind_contextvars("request_id")
            return labelled(response, request)

        return aware

    def plain(request):
        request.id = new_request_id()
        return labelled(get_response(request), request)

    return plain


def labelled(response, request):
    response.headers["Request-Id"] = request.id
    if trace := traces.continued(request.headers.get("traceparent")):
        response.headers["traceparent"] = trace
    if not response.streaming and "Content-Length" not in response.headers:
        response.headers["Content-Length"] = str(len(response.content))
    return response


class ForPeople:
    """Mixed into a middleware of Django's: nothing happens on the paths that programs call."""

    def __init__(self, get_response: Any) -> None:
        super().__init__(get_response)  # type: ignore[call-arg]
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: Any) -> Any:
        if request.path.startswith(settings.PROGRAM_PATHS):
            return self.get_response(request)  # type: ignore[attr-defined]
        return super().__call__(request)  # type: ignore[misc]


class Session(ForPeople, SessionMiddleware):
    pass


class Common(ForPeople, CommonMiddleware):
    pass


class Security(ForPeople, SecurityMiddleware):
    pass


class Csrf(ForPeople, CsrfViewMiddleware):
    async def process_view(self, request, callback, args, kwargs):  # type: ignore[override]
        """Asynchronous, so that Django does not hop to a thread for it on every request; it only compares cookies."""
        if request.path.startswith(settings.PROGRAM_PATHS):
            return None
        return super().process_view(request, callback, args, kwargs)


class Authentication(ForPeople, AuthenticationMiddleware):
    async def process_view(self, request, callback, args, kwargs):
        return None

    def process_exception(self, request, exception):
        """Who is signed in and asks for what they may not see is written into the audit."""
        if isinstance(exception, PermissionDenied) and getattr(request, "user", None) and request.user.is_authenticated:
            from executions import audit, keys

            ip = request.META.get("REMOTE_ADDR")
            caller = keys.Caller(None, None, person=request.user, door="admin", ip=ip)  # type: ignore[arg-type]
            audit.once("access_denied", caller=caller, subject=request.path[:80])


class Messages(ForPeople, MessageMiddleware):
    pass


class FrameOptions(ForPeople, XFrameOptionsMiddleware):
    pass


class ContentPolicy(ForPeople, CSPMiddleware):
    """Strict for the console, looser for the admin's theme and the API's own page of documentation."""

    def process_response(self, request, response):
        if request.path.startswith("/admin/") and not hasattr(response, "_csp_replace"):
            response._csp_replace = settings.ADMIN_CONTENT_SECURITY_POLICY
        return super().process_response(request, response)
