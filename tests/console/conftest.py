"""A signed-in person in a real browser; a page that complains in its console fails its test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.product import HOME, Product, environment


def sign_in_link(product: Product) -> str:
    """A fresh one, as the command prints it."""
    port = int(product.url.rpartition(":")[2])
    said = subprocess.run(
        [sys.executable, "manage.py", "sign_in_link"],
        cwd=HOME,
        env=environment(product.data, port, None),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    return next(word for word in said.split() if "/sign-in/" in word)


@pytest.fixture(scope="module")
def signed_in(product: Product, browser) -> dict:
    """The browser's memory after the operator has followed a link."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(sign_in_link(product))
    state = context.storage_state()
    context.close()
    return state


@pytest.fixture
def page(product: Product, browser, signed_in: dict) -> Iterator:
    context = browser.new_context(base_url=product.url, storage_state=signed_in)
    page = context.new_page()
    page.set_default_timeout(20_000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    assert not complaints, "\n".join(complaints)


@pytest.fixture
def session(page) -> Iterator:
    """The page of a fresh session, its first cell ready to be typed into; the session ends with the test."""
    page.goto("/")
    page.get_by_role("button", name="Start a session").click()
    page.wait_for_url("**/sessions/*")
    page.locator(".cm-content").first.click()
    yield page
    address, token = page.url.split("?")[0], page.locator("body").get_attribute("data-csrf")
    page.goto("about:blank")  # a page that still looks would complain that its session is gone
    page.request.post(f"{address}/end", headers={"X-CSRFToken": token, "Referer": address})
