"""The report: well-formed, escaped, self-contained, complete without optional files; curves and film are to scale."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sedd_graph_registry.data.tokenizers import Bytes

import sedd_graph.report
from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.report.curves import Line, Point, curve, ticks
from sedd_graph.report.html import write_report
from sedd_graph.report.samples import newest_infilled, newest_samples
from sedd_graph.store.activations import Activations, TapSpec
from sedd_graph.store.arrays import write_samples
from sedd_graph.store.files import write_json, write_text
from tests.report.films import words_of

TEMPLATES = Path(sedd_graph.report.__file__).parent / "templates"
EVIL = "<script>alert('1')</script>\"&amp;"
VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Open tags must close in order; attributes and texts are kept."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len({name for name, _ in attrs}) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def ids(self) -> list[str]:
        return [i for _, attributes in self.tags if (i := attributes.get("id")) is not None]

    def text(self, tag: str) -> list[str]:
        return [data for at, data in self.texts if at == tag]


def ids(text: str, length: int) -> list[int]:
    return [*text.encode(), *[32] * length][:length]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with every file, and a text that looks like markup in every place for text."""
    run = tmp_path / f"it's {EVIL.replace('/', '|')}"
    run.mkdir()
    write_json(run / "graph.json", {"name": EVIL, "nodes": [1, 2]})
    write_text(run / "graph.svg", "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(2)</script></svg>")
    claim = {"name": "x", "claim": EVIL, "value": EVIL, "how": EVIL, "holds": True}
    size = {"parameters": 1234, "flops_per_token": 10**6, "saved_bytes": 1, "state_bytes": 1, "batch": 2, "length": 3}
    write_json(
        run / "certificate.json",
        {"checks": [claim, {**claim, "holds": False}, {**claim, "holds": None}], "measure": size},
    )
    write_json(run / "run.json", {"argv": ["a b", EVIL], "versions": {EVIL: EVIL}, "overrides": [], "root": "/secret"})
    found = {
        "bits_per_character": 3.25,
        "bits_standard_error": math.nan,
        "perplexity": 9.5,
        "heldout_entropy_bits": 4.5,
    }
    levels: list[Any] = [
        {"low": i / 4, "high": (i + 1) / 4, "nats_per_token": 3.0 + i, "standard_error": 0.1} for i in range(4)
    ]
    levels += [[EVIL], {"low": EVIL, "high": 1, "nats_per_token": 2.0}]
    more = {"sequences": 1, "draws": 1, "weights": EVIL, "objective": EVIL, "levels": levels, "over": "masked"}
    write_json(run / "evaluation.json", {**found, **more})
    numbers = {"entropy": 2.5, "entropy_standard_error": 0.25, "rows": 1234, "rep_2": math.nan}
    how = {"sampling": {"sampler": EVIL, "steps": 4}}
    judged = {
        "store": EVIL,
        "samples": numbers,
        "reference": None,
        "judge": {"name": EVIL, "sha256": EVIL},
        "protocol": how,
    }
    odd = {"store": 1, "samples": {"entropy": EVIL}, "judge": [EVIL], "protocol": {"sampling": 2}, "reference": [3]}
    (run / "quality.jsonl").write_text(json.dumps(odd) + "\n[]\n" + json.dumps(judged) + '\n{"store')
    write_text(run / "blueprint.lock.yaml", f"name: {EVIL}\n")
    write_text(run / "tokenizer.json", Bytes().to_json())
    lines: list[dict[str, Any]] = [
        {"step": s, "loss": 1 / s, "bits_per_character": 1 / s, "learning_rate": 0.1} for s in range(1, 30)
    ]
    lines += [{"step": 10, "heldout_bits_per_character": 0.2, "heldout_bits_standard_error": 0.01}]
    lines += [{"step": 29, "final_bits_per_character": 0.1, "final_bits_standard_error": None}, {"step": 5, EVIL: EVIL}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n[1]\nnull\n{"step": 30, "lo')
    tokens = np.array([ids(EVIL, 40), ids("plain", 40)])
    trajectory = np.stack([np.full_like(tokens, 257), np.where(np.arange(40) % 2, tokens, 257), tokens])
    attributes = {"sampler": EVIL, "steps": 2, "seed": 0, "weights": "w", "mask": 257}
    for number in range(2):
        way = trajectory if number == 0 else None
        write_samples(
            run / "samples.zarr", {"tokens": tokens}, text=[EVIL, "plain"], trajectory=way, attributes=attributes
        )
    prompt = np.where(np.arange(40) < 5, tokens[:1], -1)
    write_samples(
        run / "infilled.zarr",
        {"tokens": tokens, "lengths": np.array([40, 40])},
        text=[EVIL, "plain"],
        attributes={**attributes, "prompt": prompt.tolist()},
    )
    roads = {"original": trajectory[:, 0], "edited": np.stack([trajectory[0, 0, :30], trajectory[-1, 0, 10:]])}
    write_samples(run / "edited.zarr", roads, text=[EVIL], attributes=attributes)
    with_taps = Activations(run / "activations.zarr", [TapSpec("trunk/0/x", 1, "float32", None, 2)])
    for step in (3, 6):
        with_taps.put("trunk/0/x", step, np.zeros((4, 5)))
    with_taps.close()
    return run


def test_the_page_is_well_formed_and_every_text_is_escaped(run: Path) -> None:
    page = Page(write_report(run).read_text())
    assert len(page.ids()) == len(set(page.ids()))
    assert page.text("h2") == ["One sample, from noise to text", "An edit: two roads from the same noise", "Samples", "Quality of samples", "Infilled text", "Training", "Saved activations", "Claims and proofs", "Graph", "Provenance"]  # fmt: skip
    # the only scripts are the films' data and their code, and no text has become an attribute
    data = {"type": "application/json"}
    assert [a for tag, a in page.tags if tag == "script"] == [data, data, {}]
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert page.text("h1") == page.text("title")[:1] == [EVIL]
    assert [text for text in page.text("pre") if text][:2] == [EVIL, "plain"]
    assert "".join(page.text("mark")[:1]) == (EVIL + " " * 40)[5:40]
    assert page.text("td").count(EVIL) >= 9
    assert [word for word in page.text("span") + page.text("td") if word in ("holds", "fails", "note")] == [
        "holds",
        "fails",
        "note",
    ]
    assert f"'a b' '{EVIL.replace(chr(39), chr(39) + chr(34) + chr(39) + chr(34) + chr(39))}'" in page.text("td")
    assert "/secret" not in run.joinpath("report.html").read_text()
    assert page.text("b")[0] == "3.250 "  # a standard error of one sequence is not known
    assert page.text("small")[0] == "\N{PLUS-MINUS SIGN} ?"


def test_the_page_loads_nothing(run: Path) -> None:
    page = Page(write_report(run).read_text())
    links = [
        v or "" for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href", "action", "data")
    ]
    assert links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    styles, scripts = "".join(page.text("style")), "".join(page.text("script"))
    scripts = scripts.replace("http://www.w3.org/2000/svg", "")  # the name of SVG's namespace, which is not loaded
    assert not re.search(r"url\(|@import|expression", styles)
    assert not re.search(r"https?:|fetch|XMLHttp|import|innerHTML|eval", scripts)


def test_the_policy_of_the_page_allows_its_own_script_and_style_alone(run: Path) -> None:
    text = write_report(run).read_text()
    page = Page(text)
    (policy,) = [a["content"] or "" for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert text.index("Content-Security-Policy") < text.index("<style>")  # it binds only what follows
    film, style = re.findall(r"<script>(.*?)</script>|<style>(.*?)</style>", text, flags=re.DOTALL)[::-1]
    for name, code in (("script-src", film[0]), ("style-src", style[1])):
        assert len(code) > 500
        assert rules.pop(name) == f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}
    assert not [a for _, attributes in page.tags for a in attributes if a == "style"]  # the policy would forbid them
    assert page.text("tspan") == ["training", "held out"]  # the legend has its colours without style attributes


def test_an_edit_has_two_roads_side_by_side(run: Path) -> None:
    page = Page(write_report(run).read_text())
    original, edited = json.loads(page.text("script")[1])
    assert [original["label"], edited["label"]] == ["original", "edited"]
    assert "".join(words_of(original)[-1]) == (EVIL + " " * 40)[:40]
    assert "".join(words_of(edited)[-1]) == (EVIL + " " * 40)[10:40]
    assert "".join(words_of(original)[0]) == "".join(words_of(edited)[0]) == ""


def test_there_is_one_film_and_it_ends_with_the_sample(run: Path) -> None:
    page = Page(write_report(run).read_text())
    (film,) = json.loads(page.text("script")[0])
    shown = words_of(film)
    assert "".join(shown[0]) == ""
    assert "".join(shown[1]) == EVIL[1::2] + " " * (20 - len(EVIL[1::2]))
    assert "".join(shown[2]) == (EVIL + " " * 40)[:40]


def test_the_bound_by_noise_level_and_the_quality_of_samples(run: Path) -> None:
    text = write_report(run).read_text()
    (levels, *_) = points(text)  # the first curve of the page
    assert len(levels) == 4
    assert [b[1] - a[1] for a, b in pairwise(levels)] == pytest.approx([levels[1][1] - levels[0][1]] * 3, abs=0.2)
    page = Page(text)
    assert "bound: 5 ± 0.1 at masked 0.625" in page.text("title")
    assert any("drawn over the share of tokens that are masked" in p for p in page.text("p"))
    assert page.text("caption") == [
        f" {EVIL}, 4 steps; judge {EVIL} ({EVIL[:8]})",
        " None; no judge",
    ]  # the newest first
    assert [b for b in page.text("b") if b in (EVIL, "1")] == [EVIL, "1"]
    cells = page.text("td")
    at = cells.index("unigram entropy, nats per token of the model")
    assert cells[at : at + 3] == ["unigram entropy, nats per token of the model", "2.5000 ± 0.2500", "-"]
    assert cells[at + 3 : at + 6] == ["rows", "1,234", "-"]  # no row without a number
    assert "rep-2" not in cells
    assert cells.count("rows") == 1  # of the odd record, nothing


def test_a_hole_of_any_length_is_marked_by_what_was_inserted(tmp_path: Path) -> None:
    """Rows of strings have lengths of their own, so the positions of the prompt are not those of the rows."""
    write_text(tmp_path / "tokenizer.json", Bytes().to_json())
    pieces = [("a", "bcd", "e", ""), ("a", "", "e", "fghij"), ("a", "bcd", "e", "f")]
    prompt = [[ord("a"), -1, ord("e"), -1]]
    given = np.zeros((3, 7), np.bool_)
    for row, (_, hole, _, _) in enumerate(pieces):
        given[row, [0, 1 + len(hole)]] = True
    lengths = np.array([len("".join(p)) for p in pieces])
    tokens = np.array([[*"".join(p).encode(), *[256] * 7][:7] for p in pieces])
    arrays, attributes = {"tokens": tokens, "lengths": lengths}, {"prompt": prompt, "start": 256, "sampler": "s"}
    write_samples(tmp_path / "infilled.zarr", {**arrays, "given": given}, text=[], attributes=attributes)
    found = newest_infilled(tmp_path, Bytes())
    assert found is not None
    assert found.texts == [
        [(False, "a"), (True, "bcd"), (False, "e")],
        [(False, "ae"), (True, "fghij")],
        [(False, "a"), (True, "bcd"), (False, "e"), (True, "f")],
    ]
    page = Page(write_report(tmp_path).read_text())
    assert page.text("mark") == ["bcd", "fghij", "bcd", "f"]
    # without the array it is not known which tokens were given: nothing is shown, rather than something wrong
    write_samples(tmp_path / "infilled.zarr", arrays, text=[], attributes=attributes)
    assert newest_infilled(tmp_path, Bytes()) is None


def test_rows_with_prompts_of_their_own_are_marked_each_by_its_own(tmp_path: Path) -> None:
    tokens = np.array([list(b"abcd"), list(b"efgh")])
    prompt = [[97, -1, -1, 100], [-1, 102, -1, -1]]
    lengths = np.array([4, 4])
    attributes = {"prompt": prompt, "sampler": "s"}
    for more in ({}, {"given": np.array(prompt) >= 0}):  # written before ``given`` was stored, and since
        write_samples(tmp_path / "infilled.zarr", {"tokens": tokens, "lengths": lengths, **more}, attributes=attributes)
        found = newest_infilled(tmp_path, Bytes())
        assert found is not None
        assert found.texts == [[(False, "a"), (True, "bc"), (False, "d")], [(True, "e"), (False, "f"), (True, "gh")]]


def test_a_text_stays_text_wherever_it_comes_from(tmp_path: Path) -> None:
    """Also in a script, in an attribute and in the CSS of a figure."""
    write_text(tmp_path / "tokenizer.json", Bytes().to_json())
    tokens = np.array([ids("</script><img src=x onerror=alert(3)>", 40)])
    attributes = {"sampler": "'\" onload='alert(4)", "mask": 257}
    write_samples(
        tmp_path / "samples.zarr", {"tokens": tokens}, text=["a"], trajectory=tokens[None], attributes=attributes
    )
    write_json(
        tmp_path / "evaluation.json",
        {"over": '" onclick="', "levels": [{"low": 0, "high": 1, "nats_per_token": 1.0}], "caveat": EVIL},
    )
    page = Page(write_report(tmp_path).read_text())
    assert [tag for tag, _ in page.tags if tag in ("script", "img")] == ["script", "script"]
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert any(EVIL in p for p in page.text("p"))


@pytest.mark.parametrize("template", sorted(TEMPLATES.iterdir()), ids=lambda path: path.name)
def test_no_template_turns_escaping_off(template: Path) -> None:
    assert not re.search(r"\|\s*safe|autoescape|Markup", template.read_text())


@pytest.mark.parametrize("missing", ["graph.json", "graph.svg", "certificate.json", "run.json", "evaluation.json", "blueprint.lock.yaml", "tokenizer.json", "metrics.jsonl", "all"])  # fmt: skip
def test_parts_without_their_file_are_left_out(run: Path, missing: str) -> None:
    if missing == "all":
        run = run.parent / "empty"
        run.mkdir()
    else:
        (run / missing).unlink()
    page = Page(write_report(run).read_text())
    assert page.text("h1") == [run.name if missing in ("graph.json", "all") else EVIL]
    if missing == "all":
        assert page.text("h2") == []
    if missing == "tokenizer.json":
        assert "Samples" in page.text("h2")
        assert "One sample, from noise to text" not in page.text("h2")
        assert "An edit: two roads from the same noise" not in page.text("h2")


def test_a_broken_tokenizer_removes_only_the_parts_that_need_it(run: Path) -> None:
    (run / "tokenizer.json").write_text('{"kind": ')
    with pytest.raises(Exception, match="not JSON"):
        load_tokenizer(run)
    assert "Samples" in Page(write_report(run).read_text()).text("h2")


def points(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (p.split(",") for p in line.split())]
        for line in re.findall(r'<polyline points="([^"]*)"', svg)
    ]


def test_a_curve_is_to_scale() -> None:
    values = [5.0, 4.0, 2.0, 3.0]
    svg = curve([Line("a", "red", [Point(10 * i, v) for i, v in enumerate(values)])], title="<t>")
    Page(svg)
    (line,) = points(svg)
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert x3 - x2 == pytest.approx(x1 - x0, abs=0.2)
    assert (y1 - y0) * 2 == pytest.approx(y2 - y1, abs=0.3)
    assert y3 - y2 == pytest.approx(y0 - y1, abs=0.3)
    assert "&lt;t&gt;" in svg
    # a tick stands where a point of its value does
    heights = {float(v): float(y) - 4 for y, v in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)}
    assert heights[3.0] == pytest.approx(y3, abs=0.2)


@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0], [0.0, 0.0], [math.nan, 1.0, math.inf], [1e-30, 2e-30], [1e9, -1e9]]
)
def test_odd_curves_stay_inside_their_frame(values: list[float]) -> None:
    svg = curve([Line("a", "red", [Point(i, v, 0.5) for i, v in enumerate(values)])], title="t")
    Page(svg)
    assert "nan" not in svg
    assert "inf" not in svg
    (line,) = points(svg)
    assert len(line) == sum(map(math.isfinite, values))
    assert all(0 <= x <= 520 and 0 <= y <= 250 for x, y in line)
    assert curve([Line("a", "red", [Point(1, math.nan)])], title="t") == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (3.2, 4.1, [3.2, 3.4, 3.6, 3.8, 4.0]), (0, 0.007, [0, 0.002, 0.004, 0.006])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_samples_say_how_they_were_drawn(tmp_path: Path) -> None:
    for number, settings in enumerate(
        [{"temperature": 1.0, "top_p": 1.0}, {"temperature": 0.8, "top_p": 0.9}, "x", None]
    ):
        run = tmp_path / str(number)
        run.mkdir()
        attributes = {"sampler": "ancestral.v1", "seed": 0} | ({} if settings is None else {"settings": settings})
        write_samples(run / "samples.zarr", {"tokens": np.zeros((1, 2), np.int64)}, text=["a"], attributes=attributes)
        found = newest_samples(run)
        assert found is not None
        said = ", temperature 0.8, top_p 0.9" if number == 1 else ""
        assert found.facts == f"sampler ancestral.v1, seed 0{said}, samples.zarr"
