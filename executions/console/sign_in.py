"""Signing in by a one-time link, and out again."""

from __future__ import annotations

from django.contrib.auth import login, logout
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_POST

from executions import audit, keys


@require_GET
def how(request: HttpRequest) -> HttpResponse:
    """Says how to get a link; remembers the page that was asked for."""
    wanted = request.GET.get("next", "/")
    if url_has_allowed_host_and_scheme(wanted, allowed_hosts=None):
        request.session["next"] = wanted
    return render(request, "console/sign_in.html")


@never_cache
@require_GET  # a HEAD of a chat program that draws previews must not use the link up
def redeem(request: HttpRequest, token: str) -> HttpResponse:
    user = None if "prefetch" in request.headers.get("Sec-Purpose", "") else keys.redeem_sign_in(token)
    if user is None:
        if "Sec-Purpose" not in request.headers:
            audit.once(
                "sign_in_failed", subject="a link that is used, old or unknown", ip=request.META.get("REMOTE_ADDR")
            )
        return render(request, "console/sign_in.html", {"used": True}, status=410)
    wanted = request.session.get("next", "/")
    login(request, user, backend="django.contrib.auth.backends.ModelBackend")
    return redirect(wanted)


@require_POST
def out(request: HttpRequest) -> HttpResponse:
    logout(request)
    return redirect("/sign-in")
