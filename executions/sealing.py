"""Secrets that must be read again later, kept in rows under this installation's own secret."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from hashlib import sha256

from django.conf import settings


def sealed(text: str, purpose: str) -> str:
    return _fernet(purpose).encrypt(text.encode()).decode()


def opened(text: str, purpose: str) -> str | None:
    """What was sealed for this purpose; None where that was under another secret."""
    from cryptography.fernet import InvalidToken

    try:
        return _fernet(purpose).decrypt(text.encode()).decode()
    except InvalidToken:
        return None


def _fernet(purpose: str):
    from cryptography.fernet import Fernet  # not before something is sealed

    return Fernet(urlsafe_b64encode(sha256(f"{purpose}:{settings.SECRET_KEY}".encode()).digest()))
