"""Keys at the REST door."""

from __future__ import annotations

from rest_framework.authentication import BaseAuthentication
from rest_framework.permissions import BasePermission

from executions import keys, traces
from executions.states import Scope


def caller_of(request, door: str = "rest") -> keys.Caller:
    """The caller behind a request's key. Raises Unauthenticated."""
    return keys.authenticate(
        keys.bearer(request.headers),
        door=door,
        ip=request.META.get("REMOTE_ADDR") or None,
        request_id=getattr(request, "id", ""),
        trace_id=traces.trace_of(request.headers.get("traceparent")),
    )


class KeyAuthentication(BaseAuthentication):
    """`request.auth` is the Caller."""

    def authenticate(self, request):
        return None, caller_of(request._request)

    def authenticate_header(self, request):
        return "Bearer"


class HasScope(BasePermission):
    """READ for safe methods, otherwise what the view names in `scope` (RUN unless it says more)."""

    def has_permission(self, request, view):
        request.auth.needs(Scope.READ if request.method in ("GET", "HEAD") else getattr(view, "scope", Scope.RUN))
        return True
