"""Cursor pages, and rows in the shapes of serializers.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from django.http import HttpRequest, HttpResponse
from pydantic import BaseModel
from rest_framework.pagination import CursorPagination
from rest_framework.serializers import BaseSerializer

from executions.errors import Invalid


class Pages(CursorPagination):
    """Newest first; `cursor` from next, `limit` up to 200."""

    page_size = 50
    max_page_size = 200
    page_size_query_param = "limit"
    ordering = ("-created_at", "-id")


def shaped(shape: Callable[[Any], Any]) -> type[BaseSerializer]:
    """A serializer that sends what `shape` makes of a row."""

    class Shaped(BaseSerializer):
        def to_representation(self, instance):
            return shape(instance).model_dump(mode="json")

    return Shaped


ROWS_MOST = 1000  # of a list that has no pages


def listed(shapes: Iterable[BaseModel]) -> HttpResponse:
    """A list that has no pages."""
    body = {"results": [shape.model_dump(mode="json") for shape in shapes]}
    return HttpResponse(json.dumps(body), content_type="application/json")


def known_query(request: HttpRequest, known: Iterable[str] = (), prefix: str = "") -> None:
    """Refuse a parameter that this address does not have. Raises Invalid with its name."""
    for name in request.GET:
        if name not in known and not (prefix and name.startswith(prefix)):
            there = ", ".join(sorted(known)) or "none"
            raise Invalid(f"{name[:50]}: not known here; known are {there}.", field=name[:50])
