"""What people do in the console, in a real browser against the real product."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.console.conftest import sign_in_link


def run(page: Page, code: str, keys: str = "Control+Enter") -> None:
    """Type over the cell that has the focus, and run it."""
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    page.keyboard.insert_text(code)
    page.keyboard.press(keys)


def last_output(page: Page):
    return page.locator(".cell .output").last


def test_a_link_signs_in_once_and_returns_to_the_page_that_was_asked_for(product, browser):
    link = sign_in_link(product)
    context = browser.new_context(base_url=product.url)
    page = context.new_page()

    page.goto("/usage")
    expect(page).to_have_url(re.compile("/sign-in"))
    expect(page.get_by_text("manage.py sign_in_link")).to_be_visible()
    page.goto(link)

    expect(page).to_have_url(re.compile("/usage$"))
    page.get_by_text("operator", exact=True).click()
    page.get_by_role("button", name="Sign out").click()
    page.goto(link)
    expect(page.get_by_text("This link was used before")).to_be_visible()
    context.close()


def test_output_arrives_while_the_code_still_runs(session: Page):
    run(session, "import time\nprint('first', flush=True)\ntime.sleep(60)\nprint('last')")

    expect(last_output(session)).to_contain_text("first")
    expect(session.locator(".cell-count")).to_have_text("[*]")
    expect(session.get_by_role("button", name="Stop")).to_be_visible()
    expect(last_output(session)).not_to_contain_text("last")
    session.get_by_role("button", name="Stop").click()
    expect(session.locator(".state.cancelled")).to_be_visible()


def test_the_first_cell_shows_a_plot_and_a_table(session: Page):
    session.keyboard.press("Shift+Enter")

    expect(session.locator(".output img[alt]")).to_be_visible()
    expect(session.locator(".output table tbody tr")).to_have_count(5)
    expect(session.locator(".cell")).to_have_count(2)
    natural = session.locator(".output img").evaluate("image => image.decode().then(() => image.naturalWidth)")
    assert natural > 300


def test_an_endless_loop_is_stopped_and_the_variables_survive(session: Page):
    run(session, "kept = 41")
    expect(session.locator(".state.succeeded")).to_be_visible()
    run(session, "while True: pass")
    expect(session.locator(".state.running")).to_be_visible()

    session.keyboard.press("Escape")
    session.keyboard.press("i")
    session.keyboard.press("i")
    expect(session.locator(".state.cancelled")).to_be_visible()

    session.keyboard.press("Enter")
    run(session, "kept + 1")
    expect(last_output(session)).to_have_text("42")


def test_an_uploaded_file_is_read_by_code_and_comes_back_unchanged(session: Page):
    numbers = b"a,b\n1,2\n3,4\n"
    session.set_input_files("input[type=file]", {"name": "numbers.csv", "mimeType": "text/csv", "buffer": numbers})
    link = session.get_by_role("link", name="numbers.csv")
    expect(link).to_be_visible()

    session.locator(".cm-content").first.click()
    run(session, "import pandas\nint(pandas.read_csv('numbers.csv').b.sum())")
    expect(last_output(session)).to_have_text("6")

    with session.expect_download() as download:
        link.click()
    assert download.value.path().read_bytes() == numbers
    answer = session.request.get(link.get_attribute("href"))
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_run_is_found_again_by_its_address_and_by_its_text(session: Page):
    run(session, "print('needle in a haystack')")
    expect(session.locator(".state.succeeded")).to_be_visible()

    session.get_by_role("link", name="run", exact=True).click()
    expect(session.get_by_role("log")).to_have_text("needle in a haystack")
    address = session.url
    session.goto("/runs?q=needle+in&state=succeeded")

    expect(session.locator("tbody tr")).to_have_count(1)
    session.locator("tbody a").first.click()
    expect(session).to_have_url(address)
    expect(session.locator("pre .tok-string").first).to_have_text("'needle in a haystack'")
    session.go_back()
    session.go_back()
    session.go_back()


def test_a_run_is_run_again_by_keyboard_alone_in_a_fresh_sandbox(session: Page):
    run(session, "print('a' in globals()); a = 1")
    expect(session.locator(".state.succeeded")).to_be_visible()
    there = session.url
    session.get_by_role("link", name="run", exact=True).click()
    first, where = session.url, session.get_by_label("Where to run it again")
    again = session.get_by_role("button", name="Run again")
    expect(again).to_have_accessible_description(
        re.compile("in a fresh sandbox. It is a run of its own and is charged")
    )

    where.focus()
    session.keyboard.type("on local")
    expect(where).to_have_value("local")
    session.keyboard.press("Tab")
    expect(again).to_be_focused()
    session.keyboard.press("Enter")

    session.wait_for_url(lambda url: "/runs/" in url and url != first)
    expect(session.locator("#run-state")).to_have_text("succeeded")
    expect(session.get_by_role("log")).to_have_text("False")
    session.get_by_role("link", name=first.rpartition("/")[2]).click()
    expect(session).to_have_url(first)
    session.goto(there)


def test_cells_and_their_output_are_there_after_a_reload(session: Page):
    run(session, "print('still here')", "Shift+Enter")
    expect(session.locator(".state.succeeded")).to_be_visible()
    session.keyboard.insert_text("not run yet")
    expect(session.locator(".cell").last).to_contain_text("not run yet")
    session.wait_for_function("() => JSON.stringify(localStorage).includes('not run yet')")

    session.reload()

    expect(session.locator(".cell .output").first).to_have_text("still here")
    expect(session.locator(".cell").last).to_contain_text("not run yet")
    expect(session.locator(".cell")).to_have_count(2)


HOSTILE = """
from IPython.display import HTML, Markdown, SVG, Latex, display
class Evil:
    def _repr_html_(self):
        return ("<script>parent.pwned = 1</script><img src=x onerror='parent.pwned = 2'><a href='javascript:pwned=3'>go</a>"
                "<style>body {display: none}</style><form action=/keys method=post><button>Sign in</button></form>"
                "<iframe srcdoc='<script>parent.pwned = 4</script>'></iframe><svg onload='pwned = 5'></svg><b id=banner>html</b>")
display(Evil())
display(Markdown("<script>pwned = 6</script>\\n\\n[go](javascript:pwned=7) **text**"))
display(SVG("<svg xmlns='http://www.w3.org/2000/svg' onload='parent.pwned = 8'><script>parent.pwned = 9</script></svg>"))
display(Latex(r"$\\href{javascript:pwned=10}{go} x^2$"))
print("\\x1b]8;;javascript:pwned=11\\x07link\\x1b]8;;\\x07 <img src=x onerror='pwned=12'>")
"""


def test_hostile_output_neither_acts_nor_poses_as_the_console(session: Page):
    asked: list[str] = []
    session.on("request", lambda request: asked.append(request.url))

    run(session, HOSTILE)

    expect(session.locator(".state.succeeded")).to_be_visible()
    output = last_output(session)
    expect(output.locator("b")).to_have_text("html")
    expect(output.locator("strong")).to_have_text("text")
    expect(output.locator("img")).to_have_count(2)  # one without a source, one SVG that is only an image
    expect(output.locator(".katex")).to_be_visible()
    assert output.locator("script, style, form, iframe, [id], [onerror], [onload]").count() == 0
    assert output.locator("a[href^='javascript']").count() == 0
    assert not [url for url in asked if url.endswith("/x")]
    assert session.evaluate("window.pwned") is None
    expect(session.get_by_role("heading", level=1)).to_be_visible()


def test_interactive_output_runs_only_on_request_and_in_an_origin_of_its_own(session: Page):
    run(
        session,
        "from IPython.display import HTML\n"
        "HTML('<p id=p>still</p><script>p.textContent = origin; try { p.textContent += parent.document.cookie }"
        ' catch { p.textContent += " walled" }</script>\')',
    )
    session.get_by_role("button", name="isolated frame").click()

    inside = session.frame_locator("iframe").locator("#p")
    expect(inside).to_have_text("null walled")


def test_a_broken_connection_loses_nothing(session: Page):
    run(session, "import time\nfor n in range(30): print('line', n, flush=True); time.sleep(0.1)")
    expect(last_output(session)).to_contain_text("line 3\n")

    session.context.set_offline(True)  # the page closes its socket
    expect(session.get_by_text("The connection broke")).to_be_visible()
    session.context.set_offline(False)

    expect(session.get_by_text("Reconnected, nothing lost.").first).to_be_visible()
    expect(session.locator(".state.succeeded")).to_be_visible()
    expect(last_output(session)).to_have_text("".join(f"line {n}\n" for n in range(30)), use_inner_text=True)


def test_long_output_is_cut_on_the_page_and_whole_in_the_file(session: Page):
    run(session, "for n in range(20_000): print(n)")

    expect(session.locator(".state.succeeded")).to_be_visible()
    expect(session.get_by_text("Cut at 5,000 lines. 15,000 more.")).to_be_visible()
    with session.expect_download() as download:
        session.get_by_role("link", name="Whole output as a file").click()
    assert download.value.path().read_text().splitlines() == [str(n) for n in range(20_000)]


def test_a_traceback_is_shown_and_the_cells_behind_it_do_not_run(session: Page):
    run(session, "1/0", "Alt+Enter")
    session.keyboard.insert_text("print('never')")
    expect(session.locator(".state.failed")).to_be_visible()
    session.get_by_role("button", name="Run all").click()

    expect(session.locator(".cell").first.locator(".failure")).to_contain_text("ZeroDivisionError")
    expect(session.locator(".state.failed")).to_have_count(1)
    expect(session.locator(".run.stop")).to_have_count(0)
    expect(last_output(session)).to_be_empty()


def test_the_keyboard_alone_writes_cells_and_leaves_the_editor(session: Page):
    session.keyboard.press("Escape")
    expect(session.locator("#mode")).to_contain_text("Command mode")
    session.keyboard.press("b")
    session.keyboard.press("Enter")
    session.keyboard.insert_text("print('by keyboard')")
    session.keyboard.press("Control+Enter")
    expect(last_output(session)).to_have_text("by keyboard")

    session.keyboard.press("Escape")
    session.keyboard.press("d")
    session.keyboard.press("d")
    expect(session.locator(".cell")).to_have_count(1)
    session.keyboard.press("Tab")
    assert session.evaluate("document.activeElement.tagName") != "BODY"


def test_a_key_is_shown_once_and_works(page: Page, product):
    page.goto("/keys")
    page.get_by_label("Name, such as").fill("notebook test")
    page.get_by_role("button", name="Make a key").click()
    token = re.search(r"sg_[0-9a-f]{88}", page.locator("#token").inner_text()).group()

    answer = page.request.post(
        "/api/v1/executions", headers={"Authorization": f"Bearer {token}"}, data={"code": "print(6*7)"}
    )

    assert answer.json()["logs"]["stdout"] == "42\n"
    page.goto("/keys")
    assert token not in page.content()
    expect(page.get_by_role("rowheader", name="notebook test")).to_be_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_is_accessible(session: Page, theme: str):
    run(session, "import pandas\nprint('text')\npandas.DataFrame({'a': [1]})")
    expect(session.locator(".state.succeeded")).to_be_visible()
    there, run_page = session.url, session.get_by_role("link", name="run", exact=True).get_attribute("href")
    session.emulate_media(color_scheme=theme)
    wrong = {}

    for address in [there, run_page, "/", "/runs", "/runs?q=nothing+like+this", "/usage", "/keys", "/sign-in"]:
        session.goto(address)
        session.wait_for_load_state("networkidle")
        found = Axe().run(session, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]})
        serious = [v for v in found.response["violations"] if v["impact"] in ("serious", "critical")]
        if serious:
            wrong[address] = [(v["id"], [node["html"][:200] for node in v["nodes"][:3]]) for v in serious]
        for width in (360, 1920):
            session.set_viewport_size({"width": width, "height": 800})
            assert session.evaluate("document.documentElement.scrollWidth <= innerWidth"), (address, width)

    session.goto(there)
    assert wrong == {}
