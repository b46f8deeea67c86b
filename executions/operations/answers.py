"""Writes that make no execution and no session, done once per Idempotency-Key: the first answer is kept for a day.

What only writes rows is done in the transaction that keeps its answer, so that neither is there without the other.
What acts on a machine is claimed first; where its process dies before it has answered, a repetition after
CLAIM_SECONDS does it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from django.db import IntegrityError, transaction
from django.utils import timezone

from executions.errors import Conflict, Invalid, KeyReused
from executions.keys import Caller
from executions.models import AnswerRecord

CLAIM_SECONDS = 660  # longer than anything that is claimed may take
KEPT = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer: status and body."""

    status: int
    body: str


def in_one(caller: Caller, token: str, fingerprint: str, act: Callable[[], tuple[Kept, Kept]]) -> tuple[Kept, bool]:
    """(what `act` answers, or answered before; whether that was before). `act` gives its answer, and what is kept of it.

    Raises KeyReused, and whatever `act` raises: then nothing has happened.
    """
    for _ in range(2):
        if (record := _known(caller, token, fingerprint)) is not None:
            return _answered(record), True
        try:
            with transaction.atomic(durable=True):
                record = AnswerRecord.objects.create(key_id=_key(caller), token=token, fingerprint=fingerprint)
                answer, kept = act()
                record.status, record.body = kept.status, kept.body
                record.save(update_fields=["status", "body"])
            return answer, False
        except IntegrityError:  # its twin was faster: answer as it did
            if not AnswerRecord.objects.filter(key=caller.key, token=token).exists():
                raise
    raise Conflict("The same request is under way.", retry_after=1)


def claim(caller: Caller, token: str, fingerprint: str) -> Kept | None:
    """What was answered before; None: this process is to do it, and then to `keep` or `let_go`. Raises Conflict, KeyReused."""
    if (record := _known(caller, token, fingerprint)) is not None:
        if record.status is not None:
            return _answered(record)
        dead = timezone.now() - timedelta(seconds=CLAIM_SECONDS)
        if AnswerRecord.objects.filter(pk=record.pk, status=None, created_at__lt=dead).update(
            created_at=timezone.now()
        ):
            return None
        raise Conflict("The same request is under way.", retry_after=1)
    try:
        with transaction.atomic():
            AnswerRecord.objects.create(key_id=_key(caller), token=token, fingerprint=fingerprint)
    except IntegrityError:
        raise Conflict("The same request is under way.", retry_after=1) from None
    return None


def keep(caller: Caller, token: str, answer: Kept) -> None:
    AnswerRecord.objects.filter(key=caller.key, token=token).update(status=answer.status, body=answer.body)


def let_go(caller: Caller, token: str) -> None:
    """It failed, and may be tried again."""
    AnswerRecord.objects.filter(key=caller.key, token=token, status=None).delete()


def _key(caller: Caller) -> str:
    assert caller.key is not None  # whoever comes by REST has one
    return caller.key.pk


def _known(caller: Caller, token: str, fingerprint: str) -> AnswerRecord | None:
    if len(token) > 255 or not token.isprintable():
        raise Invalid("Idempotency-Key: at most 255 printable characters.", field="Idempotency-Key")
    AnswerRecord.objects.filter(key=caller.key, created_at__lt=timezone.now() - KEPT).delete()
    record = AnswerRecord.objects.filter(key=caller.key, token=token).first()
    if record is not None and record.fingerprint != fingerprint:
        raise KeyReused
    return record


def _answered(record: AnswerRecord) -> Kept:
    if record.status is None:
        raise Conflict("The same request is under way.", retry_after=1)
    return Kept(record.status, record.body)
