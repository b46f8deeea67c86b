"""Idempotency-Key at writes that make no execution and no session: a repetition is answered as the first was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from django.http import HttpRequest, HttpResponse

from executions.api.auth import caller_of
from executions.hop import rows
from executions.keys import Caller
from executions.operations import answers
from executions.operations.answers import Kept


def token_of(request: HttpRequest) -> str | None:
    return request.headers.get("Idempotency-Key") or None


def fingerprint(request: HttpRequest) -> str:
    said = [str(request.method), request.get_full_path()]
    return hashlib.sha256("\n".join(said).encode() + b"\n" + request.body).hexdigest()


async def written(request: HttpRequest, act: Callable[[Caller], tuple[Kept, Kept]]) -> HttpResponse:
    """Do what only writes rows, in one transaction with the record of its answer."""

    def do() -> tuple[Kept, bool]:
        caller = caller_of(request)
        token = token_of(request)
        if token is None:
            return act(caller)[0], False
        return answers.in_one(caller, token, fingerprint(request), lambda: act(caller))

    return _response(*await rows(do))


def done_once(view):
    """A view that acts on a machine, claimed under the Idempotency-Key while it does."""

    async def doing(request: HttpRequest, **path: str) -> HttpResponse:
        token = token_of(request)
        if token is None:
            return await view(request, **path)
        caller = await rows(caller_of, request)
        if (before := await rows(answers.claim, caller, token, fingerprint(request))) is not None:
            return _response(before, True)
        try:
            response: HttpResponse = await view(request, **path)
        except BaseException:
            await rows(answers.let_go, caller, token)
            raise
        await rows(answers.keep, caller, token, Kept(response.status_code, response.content.decode()))
        return response

    doing.__name__ = view.__name__
    return doing


def _response(answer: Kept, again: bool) -> HttpResponse:
    response = HttpResponse(answer.body, status=answer.status)
    if answer.body:
        response["Content-Type"] = "application/json"
    if again:
        response["Idempotency-Replayed"] = "true"
    return response
