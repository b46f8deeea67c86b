"""One script of real data work through REST, MCP and the websocket, on the local runtime and on E2B: six times the same."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Iterator
from datetime import date, timedelta
from typing import Any

import pytest

from tests import servers
from tests.e2e.doors import Mcp, Rest, Websocket, png_size
from tests.product import Product, start

ROWS = 200_000

GROUP = """
import pandas as pd
df = pd.read_csv("sales.csv", parse_dates=["day"])
df.groupby("category").price.agg(["count", "mean", "max"]).round(2)
"""
PLOT = """
import matplotlib.pyplot as plt
fig, ax = plt.subplots(figsize=(6, 4), dpi=100)
df.groupby(df.day.dt.month).price.mean().plot(kind="bar", ax=ax, title="mean price by month")
plt.show()
"""
FIT = """
from sklearn.linear_model import LinearRegression
clean = df.dropna(subset=["price"])
model = LinearRegression().fit(clean.day.dt.dayofyear.to_frame(), clean.price)
print(f"{model.coef_[0]:.6f} {model.intercept_:.4f} {len(clean)}")
"""
RAISE = "df['no such column']"
LOOP = "while True: pass"
LOUD = "for n in range(50_000): print(f'{n:099d}')"
WORDS = "print('中文 и русский 🚀'); '数据🙂'"
PACKAGE = "import emoji; emoji.emojize(':thumbs_up:')"
SECRET = "kept = 'only mine'"
ASK = "'kept' in globals()"


@pytest.fixture(scope="module")
def csv() -> bytes:
    """Dates, categories, prices, gaps: the same bytes each time."""
    dice = random.Random(20261124)
    text = io.StringIO()
    text.write("day,category,price\n")
    for _ in range(ROWS):
        day = date(2025, 1, 1) + timedelta(days=dice.randrange(365))
        price = "" if dice.random() < 0.02 else f"{dice.lognormvariate(3, 0.5):.2f}"
        text.write(f"{day},{dice.choice(['tea', 'coffee', 'maté', '水'])},{price}\n")
    return text.getvalue().encode()


@pytest.fixture(scope="module")
def fronted(product: Product, template_python: Any) -> Iterator[Product]:
    """A product whose E2B is the gateway of another: the real SDK over a real socket."""
    more = {
        "E2B_API_KEY": product.key.replace("sg_", "e2b_"),
        "E2B_API_URL": f"{product.url}/e2b",
        "E2B_SANDBOX_URL": f"{product.url}/e2b",
    }
    with servers.folder() as data:
        started = start(data, servers.free_port(), template_python, **more)
        try:
            yield started
        finally:
            servers.end(started.process)


def digest(text: str) -> str:
    return f"{len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def facts(shape: dict[str, Any]) -> dict[str, Any]:
    """What must be the same at every door and on every backend."""
    error = shape.get("error")
    return {
        "state": shape["state"],
        "stdout": digest(shape["logs"]["stdout"]),
        "results": [{k: v for k, v in bundle.items() if k != "image/png"} for bundle in shape["results"]],
        "pngs": [png_size(b) for b in shape["results"] if "image/png" in b],
        "png": [hashlib.sha256(b["image/png"].encode()).hexdigest() for b in shape["results"] if "image/png" in b],
        "error": error and (error["name"], error["value"]),
    }


async def told_through(door: Any, rest: Rest, route: str, csv: bytes) -> dict[str, Any]:
    """The whole script through one door; files and packages go through the door where it has them."""
    session, other = await rest.open(route), await rest.open(route)
    by = door if hasattr(door, "put") else rest
    await rest.put(session, "/home/user/sales.csv", csv)
    await by.put(session, "/home/user/note.txt", b"one line\n")
    await by.install(session, "emoji")
    found = {
        name: facts(await door.run(session, code))
        for name, code in (
            ("note", "print(open('note.txt').read(), end='')"),
            ("group", GROUP),
            ("plot", PLOT),
            ("fit", FIT),
            ("raise", RAISE),
            ("words", WORDS),
            ("package", PACKAGE),
            ("secret", SECRET),
        )
    }
    found["loop"] = facts(await door.run(session, LOOP, timeout_seconds=2))
    found["after the loop"] = facts(await door.run(session, "kept"))
    loud = await door.run(session, LOUD)
    found["loud"] = facts(await rest.record(loud["id"]))
    found["in the other session"] = facts(await door.run(other, ASK))
    for opened in (session, other):
        await rest.end(opened)
    return found


async def test_an_endless_loop_with_a_timeout_of_2_s_has_stopped_with_its_metering_within_5_s_on_every_backend(
    fronted: Product,
):
    async with Rest(fronted) as rest:
        for route in ("local", "e2b"):
            session = await rest.open(route)
            loop = await rest.run(session, "n = 0\nwhile True: n += 1", timeout_seconds=2)
            counted = (await rest.run(session, "n"))["results"]
            later = (await rest.run(session, "import time; time.sleep(0.5); n"))["results"]
            await rest.end(session)

            assert (loop["state"], loop["error_code"], loop["backend"]) == ("timed_out", "timed_out", route)
            assert 2 <= loop["usage"]["run_seconds"] <= 5, route
            assert loop["cost_nano_usd"] > 0, route
            assert int(counted[0]["text/plain"]) > 0, route
            assert later == counted, route


async def test_the_same_script_gives_the_same_results_at_every_door_and_on_both_backends(fronted: Product, csv: bytes):
    async with Rest(fronted) as rest, Mcp(fronted) as mcp, Websocket(fronted, fronted.sign_in_url) as socket:
        told = {
            (door.name, route): await told_through(door, rest, route, csv)
            for door in (rest, mcp, socket)
            for route in ("local", "e2b")
        }

    expected = told["REST", "local"]
    assert expected["note"]["stdout"].startswith("9 characters")
    (table,) = expected["group"]["results"]
    assert "<table" in table["text/html"]
    assert sum(table["e2b/data"]["count"]) == pytest.approx(ROWS * 0.98, rel=0.01)
    assert expected["plot"]["pngs"][0][0] > 400
    assert expected["fit"]["state"] == "succeeded"
    assert expected["raise"]["error"] == ("KeyError", "'no such column'")
    assert (expected["raise"]["state"], expected["loop"]["state"]) == ("failed", "timed_out")
    assert expected["after the loop"]["results"][0]["text/plain"].strip("'") == "only mine"
    assert expected["loud"]["stdout"].startswith("5000000 characters")
    assert expected["words"]["results"][0]["text/plain"].strip("'") == "数据🙂"
    assert expected["package"]["results"][0]["text/plain"].strip("'") == "👍"
    assert expected["in the other session"]["results"][0]["text/plain"] == "False"
    for where, found in told.items():
        assert found == expected, where
