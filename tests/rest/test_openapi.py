"""The OpenAPI document: whole, valid, committed; and the page that shows it without a network."""

import json
import re
from pathlib import Path

import pytest
from drf_spectacular.validation import validate_schema

from executions.api import openapi
from executions.api.urls import urlpatterns

COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_document_is_valid_openapi_3_1():
    validate_schema(openapi.document())

    assert openapi.document()["openapi"] == "3.1.0"


def test_every_address_is_described():
    addresses = {str(p.pattern) for p in urlpatterns if str(p.pattern).startswith("api/v1/")}

    described = openapi.document()["paths"]

    assert {"/" + re.sub(r"<\w+:(\w+)>", r"{\1}", address) for address in addresses} == set(described)
    identifiers = [one["operationId"] for methods in described.values() for one in methods.values()]
    assert len(identifiers) == len(set(identifiers))


def test_the_committed_document_is_the_one_that_is_served():
    assert COMMITTED.read_text() == openapi.text(), "run: manage.py openapi"


@pytest.mark.django_db
async def test_the_document_and_its_page_need_no_key_and_no_other_host(async_client):
    document = await async_client.get("/api/schema")
    page = await async_client.get("/api/docs")

    assert json.loads(document.content) == openapi.document()
    assert document["Content-Type"] == "application/vnd.oai.openapi+json"
    assert page.status_code == 200
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", page.content.decode())
