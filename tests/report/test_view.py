"""The page of `sedd-graph view`, in headless Chromium: what it shows is the trajectory, whatever is asked of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sedd_graph_registry.data.tokenizers import Bytes

from sedd_graph.cli.main import run as command
from sedd_graph.report.film import UNKNOWN
from sedd_graph.report.html import write_report
from sedd_graph.report.view import LIMIT, write_view
from sedd_graph.store.activations import Activations, TapSpec
from sedd_graph.store.arrays import write_samples
from sedd_graph.store.files import write_json, write_text
from tests.report.browser import chromium, opened
from tests.report.test_html import Page

MASK, STEPS = 257, 12
EVIL = "</script><script>window.bad=1</script><img src=x onerror=window.bad=2>\u2028\u2029é\U0001f600 &amp; <!--"
START = 256


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def trajectory(texts: list[bytes]) -> tuple[Any, Any]:
    """Rows that are unmasked from left to right, and confidences that rise with the position."""
    tokens = np.array([list(text) for text in texts])
    length = tokens.shape[1]
    now = np.arange(STEPS + 1)[:, None, None] * length >= (np.arange(length) + 1) * STEPS
    sure = np.where(now, (np.arange(length) * 254 // (length - 1)), UNKNOWN)
    return np.where(now, tokens, MASK).astype(np.int32), np.broadcast_to(sure, (STEPS + 1, *tokens.shape)).astype(
        np.uint8
    )


def folder(tmp_path: Path, *texts: str, name: str = "run") -> Path:
    run = tmp_path / name
    run.mkdir()
    write_text(run / "tokenizer.json", Bytes().to_json())
    write_text(run / "blueprint.lock.yaml", "name: tiny\n")
    write_json(run / "graph.json", {"name": EVIL, "nodes": []})
    width = max(len(text.encode()) for text in texts)
    way, sure = trajectory([text.encode().ljust(width) for text in texts])
    attributes = {"sampler": EVIL, "steps": STEPS, "seed": 0, "weights": "w", "mask": MASK}
    write_samples(
        run / "samples.zarr",
        {"tokens": way[-1].astype(np.int64)},
        trajectory=way,
        confidence=sure,
        text=texts,
        attributes=attributes,
    )
    return run


@pytest.fixture
def page(tmp_path: Path) -> Path:
    run = folder(tmp_path, EVIL + " the cat sat", "another row of text")
    taps = Activations(run / "activations.zarr", [TapSpec("trunk/0/x", 1, "float32", None, 2)])
    for step in (3, 6):
        taps.put("trunk/0/x", step, np.linspace(-1, 1, 2 * 8 * 200).reshape(2, 8, 200) * step)
    taps.close()
    write_view([run], tmp_path / "view.html")
    return tmp_path / "view.html"


def text_of(tab: Any, film: int = 0) -> str:
    """The shown text; of masks, an underscore each."""
    return tab.evaluate(
        "n => [...document.querySelectorAll('.tokens')[n].querySelectorAll('span:not(.gone)')]"
        ".map(s => s.className === 'm' ? '_' : s.textContent).join('')", film
    )  # fmt: skip


def wait(tab: Any, expression: str) -> None:
    """Wait until a JavaScript expression holds; Playwright's own way is forbidden by the page's policy."""
    for _ in range(400):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(f"still not: {expression}")


def step_of(tab: Any) -> int:
    return int(tab.locator(".transport input").input_value())


def full(text: str, width: int) -> str:
    return text.encode().ljust(width).decode()


WIDTH = len((EVIL + " the cat sat").encode())


def test_texts_are_shown_as_text_and_do_no_harm(browser: Any, page: Path) -> None:
    assert page.stat().st_size < LIMIT
    Page(page.read_text())
    with opened(browser, page, reduced_motion="reduce") as tab:
        assert text_of(tab) == EVIL + " the cat sat"
        assert tab.evaluate("window.bad") is None
        assert tab.locator("h1").inner_text().split() == EVIL.split()
        assert tab.evaluate("document.querySelectorAll('img').length") == 0
        assert tab.evaluate("document.scripts.length") == 2
        blocked = "new Promise(r => { const i = new Image(); i.onload = () => r(1); i.onerror = () => r(0); i.src = 'http://127.0.0.1:9/x.png'; })"
        assert "img-src data:" in page.read_text()[:1500] or tab.evaluate(blocked) == 0


def test_every_frame_is_the_trajectory_forwards_and_backwards(browser: Any, page: Path) -> None:
    way, _ = trajectory([(EVIL + " the cat sat").encode()])
    with opened(browser, page, reduced_motion="reduce") as tab:
        last = STEPS
        assert step_of(tab) == last
        for step in (*range(last, -1, -1), *range(last + 1), 3, 9, 0, 12):
            tab.locator(".transport input").evaluate(
                "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", step
            )
            # bytes of a character that is not whole yet are shown as one that is unknown
            whole = bytes(int(t) for t in way[step, 0] if t != MASK)
            shown = text_of(tab).replace("_", "")
            assert shown.rstrip("\ufffd") == whole.decode(errors="ignore")
            assert tab.locator(".tokens .m").count() == int((way[step, 0] == MASK).sum())
            assert f"step {step} of {STEPS}" in tab.locator(".transport output").inner_text()


def test_play_backwards_and_keys(browser: Any, page: Path) -> None:
    with opened(browser, page, reduced_motion="reduce") as tab:
        tab.keyboard.press("Home")
        assert step_of(tab) == 0
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("ArrowLeft")
        assert step_of(tab) == 1
        tab.keyboard.press("Shift+ArrowRight")
        assert step_of(tab) == 11
        tab.keyboard.press("End")
        assert step_of(tab) == STEPS
        tab.keyboard.press("+")
        tab.keyboard.press("+")
        assert tab.get_by_label("speed").input_value() == "4"
        tab.keyboard.press(" ")  # from the end: again from noise
        wait(
            tab,
            "document.querySelector('.transport input').value === '12' && document.querySelector('.main').title === 'play'",
        )
        assert text_of(tab) == EVIL + " the cat sat"
        tab.get_by_label("play backwards").click()
        assert tab.get_by_label("pause").count() == 1
        wait(tab, "document.querySelector('.transport input').value === '0'")
        assert set(text_of(tab)) == {"_"}
        tab.keyboard.press("End")
        tab.keyboard.press("ArrowDown")
        assert text_of(tab) == full("another row of text", WIDTH)
        tab.get_by_label("row", exact=True).select_option("0")
        assert text_of(tab) == EVIL + " the cat sat"
        tab.keyboard.press("Escape")
        tab.locator("h1").click()
        tab.keyboard.press("?")
        assert tab.locator("dialog").is_visible()
        tab.keyboard.press("Escape")
        assert not tab.locator("dialog").is_visible()


def test_it_plays_by_itself_unless_motion_is_unwanted(browser: Any, page: Path) -> None:
    with opened(browser, page) as tab:
        wait(tab, "document.querySelector('.transport input').value === '12'")
        assert text_of(tab) == EVIL + " the cat sat"
    with opened(browser, page, reduced_motion="reduce") as tab:
        assert tab.get_by_label("pause").count() == 0


def test_confidences_are_colours_and_so_is_the_step(browser: Any, page: Path) -> None:
    with opened(browser, page, reduced_motion="reduce") as tab:
        classes = tab.evaluate("[...document.querySelectorAll('.tokens span')].map(s => s.className)")
        found = [int(c.split(" c")[1][0]) for c in classes]
        sure = np.arange(WIDTH) * 254 // (WIDTH - 1)
        assert found == np.minimum(9, np.floor(10 * np.sqrt(sure / 254))).astype(int).tolist()
        tab.locator(".tokens span").nth(4).hover()
        assert (
            tab.locator(".tokens span").nth(4).get_attribute("title")
            == f"probability {sure[4] / 254:.3f}, since step 1"
        )
        look = "i => getComputedStyle(document.querySelectorAll('.tokens span')[i]).backgroundColor"
        first, last = tab.evaluate(look, 0), tab.evaluate(look, WIDTH - 1)
        assert first != last
        tab.get_by_label("colour by").select_option("none")
        wait(tab, f"({look})(0) === 'rgba(0, 0, 0, 0)'")
        tab.get_by_label("colour by").select_option("when")
        wait(tab, f"({look})(0) !== ({look})({WIDTH - 1}) && ({look})(0) !== 'rgba(0, 0, 0, 0)'")


def test_two_samples_play_together_and_an_edit_has_two_roads(browser: Any, tmp_path: Path) -> None:
    one, two = folder(tmp_path, "the first text", name="a"), folder(tmp_path, "and the other text", name="b")
    (two / "samples.zarr").rename(one / "samples-2.zarr")
    write_view([one / "samples.zarr", one / "samples-2.zarr"], tmp_path / "two.html")
    with opened(browser, tmp_path / "two.html", reduced_motion="reduce") as tab:
        assert [text_of(tab, n) for n in (0, 1)] == ["the first text", "and the other text"]
        tab.keyboard.press("Home")
        assert [set(text_of(tab, n)) for n in (0, 1)] == [{"_"}, {"_"}]
        assert "samples-2.zarr" in tab.locator(".roads").inner_text()
        left, right = (tab.locator(".road").nth(n).bounding_box() for n in (0, 1))
        assert right["x"] >= left["x"] + left["width"]
        assert abs(right["y"] - left["y"]) < 1


def test_tokens_that_move_are_the_same_elements_and_those_that_go_fade(browser: Any, tmp_path: Path) -> None:
    run = folder(tmp_path, "xy")
    rows = ["the cat", "the big cat", "the big cat sat", "a big cat sat", "big cat"]
    width = max(map(len, rows))
    way = np.array([[[*row.encode(), *[START] * (width - len(row))]] for row in rows], dtype=np.int32)
    attributes = {"sampler": "s", "start": START}
    store = write_samples(run / "samples.zarr", {"tokens": way[-1]}, trajectory=way, attributes=attributes)
    write_view([store], tmp_path / "strings.html")
    with opened(browser, tmp_path / "strings.html") as tab:
        tab.keyboard.press("Home")
        assert text_of(tab) == rows[0]
        mark = "[...document.querySelectorAll('.tokens span')].slice(-3).forEach((s, i) => { s.id = 'k' + i; })"
        tab.evaluate(mark)
        for row in rows[1:]:
            tab.keyboard.press("ArrowRight")
            if row == rows[1]:  # an animation that ends at the new place runs
                assert tab.evaluate("document.getElementById('k0').getAnimations().length") == 1
            assert text_of(tab) == row
        assert tab.evaluate("['k0', 'k1', 'k2'].map(i => document.getElementById(i).textContent).join('')") == "cat"
        wait(tab, "document.querySelectorAll('.gone').length === 0")
        for row in reversed(rows[:-1]):
            tab.keyboard.press("ArrowLeft")
            assert text_of(tab) == row


def test_frames_can_be_fed_one_by_one(browser: Any, page: Path) -> None:
    with opened(browser, page, reduced_motion="reduce") as tab:
        feed = "([w, c]) => { window.v ??= new seddPlayer.TokenView(document.querySelector('.tokens')); window.v.feed(w, c); }"
        for words, shown in (
            ([None, None, None], "___"),
            ([None, " <b>", None], "_ <b>_"),
            (["a", " <b>", "!"], "a <b>!"),
            (["a", " <b>", " more", "!"], "a <b> more!"),
            ([], ""),
        ):
            tab.evaluate(feed, [words, [0.5 if w else None for w in words]])
            assert text_of(tab) == shown
        assert tab.locator(".tokens b").count() == 0


def test_dark_and_narrow(browser: Any, page: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    for scheme in ("light", "dark"):
        with opened(browser, page, width=400, color_scheme=scheme, reduced_motion="reduce") as tab:
            assert tab.evaluate("document.documentElement.scrollWidth") == 400
            before = tab.evaluate(ground)
            tab.locator("#theme").click()
            after = tab.evaluate(ground)
            bright = {
                name: sum(map(int, value[4:-1].split(","))) > 382 for name, value in (("b", before), ("a", after))
            }
            assert bright == {"b": scheme == "light", "a": scheme == "dark"}
            tab.keyboard.press("d")
            assert tab.evaluate(ground) == before


def test_activations_are_heat_maps(browser: Any, page: Path) -> None:
    with opened(browser, page, reduced_motion="reduce") as tab:
        canvas = tab.locator("#heat canvas")
        assert [canvas.evaluate(f"c => c.{side}") for side in ("height", "width")] == [8, 96]
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        tab.mouse.move(box["x"] + 5, box["y"] + 9)
        said = tab.locator("#heat output").inner_text()
        assert said.startswith(("position 0, feature 0 to 1: -6.0", "position 0, feature 0 to 1: -5.9"))
        colour = "c => [...c.getContext('2d').getImageData(0, 0, 1, 1).data.slice(0, 3)]"
        assert canvas.evaluate(colour) == [0x25, 0x63, 0xEB]  # the strongest negative value


def test_the_report_has_the_same_player_and_curves_tell_their_values(browser: Any, tmp_path: Path) -> None:
    run = folder(tmp_path, "the text of a report")
    lines = "\n".join(f'{{"step": {s}, "loss": {4 / s}, "bits_per_character": {4 / s}}}' for s in range(1, 9))
    write_text(run / "metrics.jsonl", lines + "\n")
    with opened(browser, write_report(run), reduced_motion="reduce") as tab:
        assert text_of(tab) == "the text of a report"
        curve = tab.locator("svg.curve").first
        curve.scroll_into_view_if_needed()
        box = curve.bounding_box()
        tab.mouse.move(box["x"] + box["width"] - 12, box["y"] + 50)
        output = tab.locator("figure output").first
        assert output.inner_text() == "step 8: 0.5"
        curve.focus()
        tab.keyboard.press("Home")
        assert output.inner_text() == "step 1: 4"
        tab.keyboard.press("ArrowRight")
        assert output.inner_text() == "step 2: 2"
        assert step_of(tab) == STEPS  # keys of a curve do not move the film
    with opened(browser, run / "report.html", width=400, has_touch=True, reduced_motion="reduce") as tab:
        curve = tab.locator("svg.curve").first
        curve.scroll_into_view_if_needed()
        curve.tap()
        assert tab.locator("figure output").first.inner_text().startswith("step ")
        assert tab.evaluate("document.documentElement.scrollWidth") == 400


# -- the command, without a browser ------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder(tmp_path, "a text")
    page = tmp_path / "page.html"
    page.write_text("my own page")
    assert command(["view", str(run), "-o", str(page)]) == 2
    assert "is no page of `sedd-graph view`" in capsys.readouterr().err
    assert page.read_text() == "my own page"
    page.unlink()
    for source in (run, run / "samples.zarr"):
        assert command(["view", str(source), "-o", str(page)]) == 0
    assert "kB" in capsys.readouterr().out
    assert command(["view", *[str(run)] * 3, "-o", str(page)]) == 2
    assert "one or two samples" in capsys.readouterr().err


def test_what_cannot_be_shown_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder(tmp_path, "a text")
    way = np.zeros((2, 1, 3), np.int32)
    bare = write_samples(run / "plain.zarr", {"tokens": way[0]}, attributes={})
    odd = write_samples(run / "odd.zarr", {"tokens": way[0]}, trajectory=way[0], attributes={})
    torn = write_samples(
        run / "torn.zarr", {"tokens": way[0]}, trajectory=way, confidence=np.zeros((1, 1, 3), np.uint8), attributes={}
    )
    real = write_samples(run / "real.zarr", {"tokens": way[0], "trajectory": way.astype(np.float32)}, attributes={})
    lost = tmp_path / "lost.zarr"
    for source, said in (
        (bare, "--trajectory"),
        (odd, "not 3 axes of integers"),
        (real, "not 3 axes of integers"),
        (torn, "not of the shape"),
        (lost, "does not exist"),
        (tmp_path, "tokenizer.json"),
    ):
        assert command(["view", str(source), "-o", str(tmp_path / "page.html")]) == 2, source
        assert said in capsys.readouterr().err
    (run / "samples.zarr").rename(tmp_path / "moved.zarr")
    assert command(["view", str(run), "-o", str(tmp_path / "page.html")]) == 2
    assert f"sedd-graph sample {run} --trajectory" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_damaged_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder(tmp_path, "a text")
    for chunk in (run / "samples.zarr" / "trajectory" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"\0" * chunk.stat().st_size)
    assert command(["view", str(run), "-o", str(tmp_path / "page.html")]) != 0
    assert "damaged" in capsys.readouterr().err


def test_a_large_trajectory_stays_below_the_limit(tmp_path: Path) -> None:
    run = folder(tmp_path, "a text")
    random = np.random.default_rng(0)
    way = random.integers(0, 256, (600, 20, 512)).astype(np.int32)
    write_samples(run / "samples.zarr", {"tokens": way[-1]}, trajectory=way, attributes={"mask": None})
    write_view([run], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < LIMIT
    assert "of 600 steps" in (tmp_path / "page.html").read_text()
