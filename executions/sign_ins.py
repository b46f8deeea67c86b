"""Who signed in and out, and who tried: Django's own views say so by signals alone."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.signals import user_logged_in, user_logged_out, user_login_failed
from django.dispatch import receiver
from django.http import HttpRequest

from executions import audit


def _ip(request: HttpRequest | None) -> str | None:
    return request.META.get("REMOTE_ADDR") if request is not None else None


@receiver(user_logged_in)
def signed_in(request: HttpRequest, user: Any, **signal: Any) -> None:
    if request.method is None:
        return  # nobody is there: a test's client that was given a session
    how = "link" if request.path.startswith("/sign-in/") else "password"
    audit.record("sign_in", actor=user, subject=user.get_username(), after={"by": how}, ip=_ip(request))


@receiver(user_logged_out)
def signed_out(request: HttpRequest, user: Any, **signal: Any) -> None:
    if user is not None and request.method is not None:
        audit.record("sign_out", actor=user, subject=user.get_username(), ip=_ip(request))


@receiver(user_login_failed)
def failed(credentials: dict[str, Any], request: HttpRequest | None = None, **signal: Any) -> None:
    """A name that somebody typed, never what they typed beside it; guesses at one name are written down once an hour."""
    audit.once("sign_in_failed", subject=str(credentials.get("username", ""))[:80], ip=_ip(request))
