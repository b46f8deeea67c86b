"""Cursor pages, and rows in the shapes of serializers.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from django.http import HttpRequest, HttpResponse
from pydantic import BaseModel
from rest_framework.pagination import BasePagination
from rest_framework.response import Response
from rest_framework.serializers import BaseSerializer
from rest_framework.utils.urls import replace_query_param

from executions import newest
from executions.errors import Invalid


class Pages(BasePagination):
    """Newest first; `cursor` from next, `limit` up to 200. The view's `read` says how its list is read."""

    page_size = 50
    max_page_size = 200

    def paginate_queryset(self, queryset: Any, request: Any, view: Any = None) -> list[Any]:
        self.url = request.build_absolute_uri()
        limit, cursor = request.GET.get("limit", ""), request.GET.get("cursor", "")
        wanted = int(limit) if limit.isascii() and limit.isdigit() and len(limit) < 10 else self.page_size
        after = newest.place(cursor)
        if cursor and after is None:
            raise Invalid("That is not a cursor of this list.", field="cursor", remedy="Begin again without a cursor.")
        size = min(wanted or self.page_size, self.max_page_size)
        found, self.next = view.read(queryset, size, after)
        return found

    def get_paginated_response(self, data: Any) -> Response:
        following = replace_query_param(self.url, "cursor", str(self.next)) if self.next else None
        return Response({"next": following, "results": data})


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
