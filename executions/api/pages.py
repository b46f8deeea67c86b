"""Cursor pages, and rows in the shapes of serializers.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rest_framework.pagination import CursorPagination
from rest_framework.serializers import BaseSerializer


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
