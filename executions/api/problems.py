"""Errors become HTTP here, once: application/problem+json with a code, a sentence and a remedy."""

from __future__ import annotations

import functools
import json
import logging
import sys
from typing import Any

from django.conf import settings
from django.core.exceptions import RequestDataTooBig
from django.http import Http404, HttpRequest, HttpResponse
from django.views import defaults
from rest_framework import exceptions
from rest_framework.exceptions import APIException, ParseError, ValidationError

from executions import audit
from executions.errors import (
    Forbidden,
    Invalid,
    MethodNotAllowed,
    NotFound,
    SandgateError,
    TooLarge,
    Unauthenticated,
    ours,
)
from executions.hop import rows

RETRY_SECONDS = 60  # where nothing is known that ends by itself: an operator may have acted by then
log = logging.getLogger(__name__)


def problem(error: SandgateError, request: Any = None) -> HttpResponse:
    """The answer for one of our errors."""
    body = error.problem() | {"request_id": getattr(request, "id", "")}
    response = HttpResponse(json.dumps(body), status=error.status, content_type="application/problem+json")
    if retry := error.facts.get("retry_after") or (RETRY_SECONDS if error.status in (429, 503) else 0):
        response["Retry-After"] = str(int(retry))
    for name, value in error.fields.items():
        response[name] = value
    if error.status == 401:
        response["WWW-Authenticate"] = "Bearer"
    return response


def answers(view):
    """An async view whose refusals and failures become problems; what nobody expected becomes a 500 that says so."""

    @functools.wraps(view)
    async def answering(request, *args, **kwargs):
        try:
            return await view(request, *args, **kwargs)
        except Exception as e:
            error = translated(e)
            if audit.tells(error):
                await rows(audit.denied, error)
            return problem(error, request)

    answering.csrf_exempt = True  # type: ignore[attr-defined]
    return answering


def translated(error: Exception) -> SandgateError:
    """Any exception as one of ours."""
    match error:
        case SandgateError():
            return error
        case RequestDataTooBig():
            return TooLarge("The body is larger than a request may be.", field="body")
        case Http404():
            return NotFound()
        case ParseError():
            return Invalid("The body is not valid JSON.", field="body")
        case ValidationError():
            return Invalid(str(error.detail)[:300])
        case exceptions.MethodNotAllowed():
            return MethodNotAllowed(str(error.detail))
        case APIException(status_code=401):
            return Unauthenticated()
        case APIException(status_code=403):
            return Forbidden()
        case APIException(status_code=404):
            return NotFound()
        case APIException():
            refused = Invalid(str(error.detail))
            refused.status = error.status_code
            return refused
    log.error("request_failed", exc_info=error)
    return ours(error)


def handler(error: Exception, context: dict) -> HttpResponse:
    """DRF's EXCEPTION_HANDLER."""
    said = translated(error)
    audit.denied(said)
    return problem(said, context["request"]._request)


async def not_found(request: HttpRequest) -> HttpResponse:
    return problem(NotFound("There is nothing at this address."), request)


def broke(request: HttpRequest) -> HttpResponse:
    """What is left to Django: programs get a problem here, too, and people its page."""
    if not request.path.startswith(settings.PROGRAM_PATHS):
        return defaults.server_error(request)
    return problem(ours(sys.exc_info()[1] or Exception()), request)
