"""The page of the server, in headless Chromium against a server of this process: what a user does and sees on it."""

import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from sedd_graph.report.serve import serve_page
from sedd_graph.runs.serve.app import Service
from tests.report.browser import chromium
from tests.runs.serve.served import model_of

REFUSED = "Failed to load resource: the server responded with a status of 400 (Bad Request)"
STEPS = 1400


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = model_of(tmp_path_factory.mktemp("page") / "run", "mdlm-tiny", f"sample.steps={STEPS}")
    server = uvicorn.Server(
        uvicorn.Config(Service(model, page=serve_page(model.name)).app, port=0, log_level="error", lifespan="on")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as made:
        yield made


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page, ready for use; it may load nothing from elsewhere and must say nothing but refusals on the console."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    tab = context.new_page()
    tab.set_default_timeout(60_000)
    said, requests = list[str](), list[str]()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(url)
    tab.wait_for_selector("#lead:has-text('absorb')")
    yield tab
    assert set(said) <= {REFUSED}
    assert all(request.startswith(url) for request in requests)
    context.close()


def run(page: Any, **fields: str) -> None:
    """Fill in fields, press the keys that run, and wait for the end."""
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#run:not([hidden])")


def text_of(page: Any, panel: str) -> str:
    found = page.evaluate(f"document.querySelector('#{panel} .tokens').textContent")
    assert isinstance(found, str)
    return found


def test_holes_fill_in_before_the_eyes_and_two_answers_stand_side_by_side(page: Any) -> None:
    page.fill("#prompt", "The <b> ")
    page.fill("#size", "40")
    page.keyboard.press("Control+h")  # in the field of the size: nothing happens
    page.focus("#prompt")
    page.keyboard.press("End")
    page.click("#hole")
    assert page.input_value("#prompt") == "The <b> [[40]]"
    page.select_option("#sampler", "remdm")  # evaluates the network in each step: there is time to look on
    # the number of masks after each change of the page
    page.evaluate(
        """() => {
          window.seen = [];
          new MutationObserver(() => window.seen.push(document.querySelectorAll("#right .m").length))
            .observe(document.querySelector("#right .tokens"), {childList: true, subtree: true, attributes: true});
        }"""
    )
    run(page, seed="12345678901234567")  # more digits than a number of JavaScript has
    seen = page.evaluate("window.seen")
    assert max(seen) > 20
    assert seen[-1] == 0
    assert len(set(seen)) >= 3  # a busy machine shows fewer drafts than there are steps
    first = text_of(page, "right")
    assert first.startswith("The <b> ")
    assert len(first) == 48
    assert re.match(r"\d+ steps \S 40 tokens", page.inner_text("#right .meter"))
    assert "seed 12345678901234567" in page.inner_text("#right .facts")
    assert page.evaluate("document.querySelectorAll('#right .tokens *:not(span)').length") == 0
    # the same seed and settings give the same answer, another temperature another one
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#past li:nth-child(2)")
    assert text_of(page, "right") == first
    page.click("h1")
    page.keyboard.press("p")
    run(page, temperature="0.2")
    assert page.is_visible("#left")
    assert text_of(page, "left") == first != text_of(page, "right")
    assert page.inner_text("#left .differs") == "temperature 1"
    assert page.inner_text("#right .differs") == "temperature 0.2"
    left, right = page.locator("#left").bounding_box(), page.locator("#right").bounding_box()
    assert left["x"] + left["width"] <= right["x"]
    assert left["y"] == right["y"]
    # an earlier answer comes back with its settings
    page.locator("#past button").last.click()
    assert text_of(page, "right") == first
    assert page.input_value("#temperature") == "1"
    page.get_by_role("button", name="Unpin").first.click()
    assert not page.is_visible("#left")


def test_errors_are_told_in_words_and_a_run_can_be_stopped(page: Any) -> None:
    run(page, prompt="The [[3]].")
    kept = text_of(page, "right")
    run(page, prompt="The [[5000]]")
    assert "5,000 to write are more than the 64" in page.inner_text("#alert")
    assert page.get_attribute("#prompt", "aria-invalid") == "true"
    assert text_of(page, "right") == kept  # the answer before stays
    run(page, prompt="The [[3]].", matching="(")
    assert page.get_attribute("#matching", "aria-invalid") == "true"
    run(page, prompt="The [[3]].", matching="")
    assert not page.is_visible("#alert")
    assert page.get_attribute("#matching", "aria-invalid") is None
    run(page, seed="1.5")
    assert "the seed is a whole number" in page.inner_text("#alert").lower()
    page.fill("#seed", "")
    page.fill("#prompt", "The [[40]].")
    page.select_option("#sampler", "remdm")  # evaluates the network in each step
    page.fill("#steps", "4000")
    page.click("#run")
    page.wait_for_selector("#right .m")
    page.keyboard.press("Escape")
    page.wait_for_selector("#run:not([hidden])")
    assert page.inner_text("#right .meter").startswith("stopped")
    assert "(stopped)" in page.inner_text("#past li:first-child")
    assert not page.is_visible("#alert")


def test_constraints_hold_and_a_phone_sees_all(page: Any) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    page.evaluate("document.getElementById('settings').open = true")
    run(page, prompt="The [[12]]", matching="The [a-c]*", forbid="a, b")
    assert text_of(page, "right") == "The cccccccccccc"
    page.click("#right .foot button:has-text('Pin')")
    run(page, forbid="")
    assert re.fullmatch("The [a-c]{12}", text_of(page, "right"))
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") == 400
    ink, back = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    light, dark = (sum(int(v) for v in re.findall(r"\d+", colour)) for colour in (ink, back))
    assert light > 600 > 100 > dark
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_the_policy_allows_only_the_script_and_style_of_the_page() -> None:
    page, policy = serve_page("<script>alert(1)</script>")
    assert "<title>&lt;script&gt;" in page
    assert page.count("<script") == page.count("<style") == 1
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert {"connect-src 'self'", "frame-ancestors 'none'", "require-trusted-types-for 'script'"} <= set(
        policy.split("; ")
    )
    assert not re.search(r"\b(src|href)\s*=|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
