"""Summaries of run folders, their list on the command line, and the page that compares them."""

import json
from pathlib import Path

import numpy as np
import pytest

from sedd_graph.cli.main import run as command
from sedd_graph.evaluation.paired import ROWS_FILE
from sedd_graph.report.compare import changed_settings, pairs, write_comparison
from sedd_graph.runs.summary import find_runs, summarise
from sedd_graph.store.files import write_json
from tests.report.test_html import EVIL, Page


def folder(root: Path, name: str, *, batch: int, shift: float, steps: int = 20, corpus: str = "text") -> Path:
    """A run folder with the files that are compared."""
    run = root / "small" / name
    run.mkdir(parents=True)
    (run / "blueprint.lock.yaml").write_text(
        f"blueprint: 1\nname: small\nprocess: {{op: absorb.v1, schedule: {{op: loglinear.v1, eps: 0.001}}}}\n"
        f"objective: {{op: masked_count.v1}}\ntrain: {{steps: {steps}, batch: {batch}}}\n"
    )
    write_json(run / "certificate.json", {"measure": {"parameters": 1234}})
    write_json(run / "run.json", {"created": f"2026-01-0{batch % 9 + 1}T00:00:00+00:00"})
    generator = np.random.default_rng(batch)
    nats = np.random.default_rng(0).normal(60, 9, 50) + shift * 32 + generator.normal(0, 0.1, 50)
    protocol = {"data": {"corpus": corpus}}
    bits = float(nats.sum() / (50 * 32) / np.log(2))
    write_json(
        run / "evaluation.json",
        {"bits_per_character": bits, "bits_standard_error": 0.1, "nats_per_token": bits * np.log(2), "sequences": 50},
    )
    write_json(run / ROWS_FILE, {"row_nats": nats.tolist(), "row_tokens": [32] * 50, "protocol": protocol})
    records = [{"step": s, "bits_per_character": 7 - s / steps + shift, "gradient_norm": 1.0} for s in (1, 10, steps)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + "{torn")
    return run


def test_a_summary_is_read_from_the_files(tmp_path: Path) -> None:
    run = folder(tmp_path, "one", batch=4, shift=0.0)
    found = summarise(run)
    assert (found.name, found.step, found.steps, found.parameters) == ("small", 20, 20, 1234)
    assert (found.process, found.objective, found.unit) == ("absorb", "masked_count", "character")
    assert found.settings["process.schedule.eps"] == 0.001
    assert found.bits == pytest.approx(json.loads((run / "evaluation.json").read_text())["bits_per_character"])


@pytest.mark.parametrize(
    "name", ["evaluation.json", "certificate.json", "run.json", "blueprint.lock.yaml", "metrics.jsonl"]
)
@pytest.mark.parametrize(
    "content", [b"", b"[1]", b'{"measure": 3, "bits_per_character": "x", "train": []}', b"\xff\x00"]
)
def test_damaged_files_are_left_out(tmp_path: Path, name: str, content: bytes) -> None:
    run = folder(tmp_path, "one", batch=4, shift=0.0)
    (run / name).write_bytes(content)
    assert summarise(run).path == run
    other = folder(tmp_path, "two", batch=5, shift=0.0)
    write_comparison([summarise(run), summarise(other)], tmp_path / "page.html")
    Page((tmp_path / "page.html").read_text())


def test_without_an_evaluation_the_last_record_of_training_counts(tmp_path: Path) -> None:
    run = folder(tmp_path, "one", batch=4, shift=0.0)
    (run / "evaluation.json").unlink()
    assert summarise(run).bits is None
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('\n{"step": 20, "heldout_bits_per_character": 3.5, "heldout_bits_standard_error": 0.25}\n')
    assert (summarise(run).bits, summarise(run).error) == (3.5, 0.25)


def test_runs_are_found_in_folders_but_not_through_links(tmp_path: Path) -> None:
    one, two = (folder(tmp_path / "runs", name, batch=4, shift=0.0) for name in ("a", "b"))
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "runs" / "small")
    folder(tmp_path / "runs" / ".hidden", "c", batch=4, shift=0.0)
    assert list(find_runs(tmp_path / "runs")) == [one, two]


def test_the_differences_are_those_of_the_rows(tmp_path: Path) -> None:
    runs = [summarise(folder(tmp_path, str(b), batch=b, shift=s)) for b, s in ((2, 0.0), (3, 0.1))]
    (found,) = pairs(runs)
    assert runs[0].bits is not None
    assert runs[1].bits is not None
    assert found.bits == pytest.approx(runs[0].bits - runs[1].bits)
    assert found.rows == 50
    assert found.p_value < 1e-6
    assert 0 < found.error < 0.01
    other = summarise(folder(tmp_path, "4", batch=4, shift=0.0, corpus="another"))
    assert pairs([runs[0], other]) == []


def test_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    runs = [folder(tmp_path, f"<script>{b}", batch=b, shift=b / 10) for b in (2, 3, 4)]
    lock = runs[0] / "blueprint.lock.yaml"
    lock.write_text(lock.read_text().replace("name: small", f"name: {json.dumps(EVIL)}"))
    write_comparison([summarise(run) for run in runs], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]  # its own, for the values of curves
    assert [t for tag, t in page.texts if tag == "h1"] == ["Comparison of 3 runs"]
    cells = [t for tag, t in page.texts if tag == "td"]
    assert "A − B" in cells
    assert "B − C" in cells
    assert "train.batch" in cells
    assert "train.steps" not in cells
    assert sum(tag == "polyline" for tag, _ in page.tags) == 3 * 2  # training curve and norm, one line for each run


def test_only_a_comparison_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(folder(tmp_path, str(b), batch=b, shift=0.0)) for b in (2, 3)]
    page = tmp_path / "page.html"
    page.write_text("my own page")
    assert command(["compare", *runs, "-o", str(page)]) == 2
    assert "is no comparison" in capsys.readouterr().err
    assert page.read_text() == "my own page"
    page.unlink()
    for _ in range(2):
        assert command(["compare", *runs, "-o", str(page)]) == 0
    assert "bits per character on the same 50 rows" in capsys.readouterr().out


def test_a_comparison_needs_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder(tmp_path, "2", batch=2, shift=0.0))
    assert command(["compare", run, "-o", str(tmp_path / "p.html")]) == 2
    assert "2 to 12 runs, not 1" in capsys.readouterr().err
    assert command(["compare", run, str(tmp_path), "-o", str(tmp_path / "p.html")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def test_settings_that_differ_are_listed(tmp_path: Path) -> None:
    runs = [summarise(folder(tmp_path, str(b), batch=b, shift=0.0, steps=b * 10)) for b in (2, 3)]
    assert changed_settings(runs) == [("train.steps", ["20", "30"]), ("train.batch", ["2", "3"])]


def test_the_list_is_filtered_and_sorted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for batch, shift in ((2, 0.2), (3, 0.0), (4, 0.1)):
        folder(tmp_path, str(batch), batch=batch, shift=shift)

    def listed(*arguments: str) -> list[str]:
        assert command(["runs", str(tmp_path), *arguments]) == 0
        return [Path(line.split()[-1]).name for line in capsys.readouterr().out.splitlines()[1:]]

    assert listed() == ["2", "3", "4"]
    assert listed("--sort", "bits") == ["3", "4", "2"]
    assert listed("--sort", "bits", "--reverse") == ["2", "4", "3"]
    assert listed("--where", "train.batch=3") == ["3"]
    assert listed("--where", "process.op=absorb", "--where", "train.batch=[24]") == ["2", "4"]
    assert command(["runs", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["settings"]["train.batch"] for r in found] == [2, 3, 4]
    assert command(["runs", str(tmp_path), "--where", "train.batsh=3"]) == 2
    assert "did you mean 'train.batch'" in capsys.readouterr().err
    assert command(["runs", str(tmp_path / "none")]) == 2


def test_numbers_that_json_lacks_are_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder(tmp_path, "2", batch=2, shift=0.0)
    (run / "evaluation.json").write_text('{"bits_per_character": NaN, "bits_standard_error": Infinity}')
    assert command(["runs", str(tmp_path), "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
