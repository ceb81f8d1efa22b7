"""Whatever a user can get wrong: exit code 2, one sentence on standard error, no traceback; and nothing is written."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sedd_graph.cli import main as cli
from sedd_graph.errors import EnvironmentFault
from tests.conftest import SMALL

SEE = "; see `sedd-graph{verb} --help`"
NO_PROCESS = "this blueprint is a graph without a process: add process, objective and sample"
NO_DEVICE = "unknown device '{}': use cpu, cuda, cuda:0, mps or auto"
HIGH = "9,223,372,036,854,775,807"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``new`` and ``trained`` are run folders; ``net`` has no process and ``dataless`` no data; ``file`` is a file."""
    place = tmp_path_factory.mktemp("place")
    process, data = SMALL.index("process:"), SMALL.index("data:")
    texts = {
        "new": SMALL,
        "net": SMALL[:process] + SMALL[data:],
        "dataless": SMALL[:data] + SMALL[SMALL.index("train:") :],
    }
    for name, text in texts.items():
        path = place / f"{name}.yaml"
        path.write_text(text)
        arguments = [
            "build",
            str(path),
            "--runs",
            str(place / "runs"),
            "--device",
            "cpu",
            "--path-to",
            str(place / "at"),
        ]
        assert cli.run(arguments) == 0
        shutil.move((place / "at").read_text(), place / name)
    shutil.copytree(place / "new", place / "trained")
    assert cli.run(["train", str(place / "trained"), "--device", "cpu"]) == 0
    (place / "file").write_text("text")
    (place / "empty").mkdir()
    return place


def run(arguments: list[str]) -> int:
    """The exit code, also where the parser leaves by itself."""
    try:
        return cli.run(arguments)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


def listing(place: Path) -> list[str]:
    return sorted(str(p) for p in place.rglob("*"))


FAULTS: list[tuple[str, str]] = [
    # arguments (@ is the folder), what is said
    ("", "sedd-graph: the following arguments are required: COMMAND" + SEE.format(verb="")),
    (
        "trian @/new",
        "sedd-graph: argument COMMAND: invalid choice: 'trian' (did you mean 'train'?); choose from init, build, tokenize, train, ",
    ),
    (
        "bulid first",
        "sedd-graph: argument COMMAND: invalid choice: 'bulid' (did you mean 'build'?); choose from init, build",
    ),
    (
        "frobnicate first",
        "sedd-graph: argument COMMAND: invalid choice: 'frobnicate'; choose from init, build, tokenize, train, distill, sweep, sample, ",
    ),
    ("sample @/new --compile blokc", "sedd-graph sample: argument --compile: invalid choice: 'blokc' (did you mean"),
    ("sample", "sedd-graph sample: the following arguments are required: run" + SEE.format(verb=" sample")),
    ("sample @/new --bacth 3", "sedd-graph: unrecognized arguments: --bacth 3" + SEE.format(verb="")),
    ("sample @/new a=b", "sedd-graph: unrecognized arguments: a=b" + SEE.format(verb="")),
    (
        "sample @/new --weights best",
        "sedd-graph sample: argument --weights: invalid choice: 'best'",
    ),
    ("sample @/new --batch 0", "sedd-graph sample: argument --batch: must be from 1 to 65,536, not 0;"),
    ("sample @/new --batch -4", "sedd-graph sample: argument --batch: must be from 1 to 65,536, not -4;"),
    ("sample @/new --batch 1e3", "sedd-graph sample: argument --batch: '1e3' is not an integer;"),
    ("sample @/new --length 0", "sedd-graph sample: argument --length: must be from 1 to 1,048,576, not 0;"),
    (
        "sample @/new --length 9999999999",
        "sedd-graph sample: argument --length: must be from 1 to 1,048,576, not 9,999,",
    ),
    ("sample @/new --seed -1", f"sedd-graph sample: argument --seed: must be from 0 to {HIGH}, not -1;"),
    (f"sample @/new --seed {2**63}", f"sedd-graph sample: argument --seed: must be from 0 to {HIGH}, not "),
    ("sample @/new --steps 0", "sedd-graph sample: argument --steps: must be from 1 to 1,000,000, not 0;"),
    ("sample @/new --device tpu", NO_DEVICE.format("tpu")),
    ("sample @/new --device meta", NO_DEVICE.format("meta")),
    ("sample @/new --device cpu:3", NO_DEVICE.format("cpu:3")),
    ("train @/new --device cudaa", NO_DEVICE.format("cudaa")),
    ("eval @/new --device :0", NO_DEVICE.format(":0")),
    ("build @/new.yaml --device gpu", NO_DEVICE.format("gpu")),
    ("export @/new -o @/out --device gpu", NO_DEVICE.format("gpu")),
    ("sample @/nowhere", "@/nowhere is not a run folder: there is no blueprint.lock.yaml in it"),
    ("sample @/new.yaml", "@/new.yaml is not a run folder: there is no blueprint.lock.yaml in it"),
    ("sample @/net", NO_PROCESS),
    ("infill @/net --text [[3]]", NO_PROCESS),
    ("train @/net", NO_PROCESS),
    ("eval @/net", NO_PROCESS),
    ("sample @/dataless", "there is no tokenizer in @/dataless: tokens cannot become text"),
    ("infill @/dataless --prefix a", "there is no tokenizer in @/dataless: tokens cannot become text"),
    ("train @/dataless", "this blueprint has no 'data' section"),
    ("eval @/dataless", "this blueprint has no 'data' section"),
    ("serve @/net", "serve: @/net is no model of text: serve a run of tokens, strings or vectors"),
    ("serve @/dataless", "there is no tokenizer in @/dataless: tokens cannot become text, nor text tokens"),
    ("serve @/empty", "@/empty is not a run folder: there is no blueprint.lock.yaml in it"),
    ("serve @/new --api-key-file @/none", "@/none: cannot be read: No such file or directory"),
    ("serve @/new --name=", "--name is empty: give the model a name, or leave --name out"),
    (
        "serve @/new --port 65536",
        "sedd-graph serve: argument --port: must be from 0 to 65,535, not 65,536" + SEE.format(verb=" serve"),
    ),
    ("infill @/new", "infill: give --text 'The [[12]] is', or --prefix or --suffix"),
    (
        "infill @/new --text hole",
        "infill: --text has no hole: write [[N]] where N tokens are free, such as 'The [[12]] is'",
    ),
    (
        "infill @/new --text a[[0]]b",
        "infill: nothing is free: write [[N]] with N of at least 1 where the model is to write",
    ),
    ("infill @/new --text [[99999999]]", "infill: [[99999999]] makes more than 1,048,576 tokens"),
    ("infill @/new --text a[[1048576]]", "infill: [[1048576]] makes more than 1,048,576 tokens"),
    ("infill @/new --text a[[3]] --suffix b", "infill: give --text, or --prefix and --suffix, not both"),
    ("infill @/new --text \N{SNOWMAN}[[3]]", "infill: the text has characters that the model was not trained on"),
    ("infill @/new --prefix ab --suffix c --length 3", "infill: prefix and suffix have 3 tokens; nothing is free of 3"),
    ("infill @/new --text abc[[3]] --length 5", "infill: the text has 6 tokens, more than --length 5"),
    ("infill @/new --text a[[3]]b[[2]] --hole a --hole b --hole c", "infill: 3 expressions for 2 holes: give one for"),
    ("infill @/new --text a[[3]] --hole b)|(c", "infill: --hole 'b)|(c': at character 2 of 'b)|(c': this ')' closes"),
    ("infill @/new --text a[[3]] --hole (?=b).*", "infill: --hole '(?=b).*': a look-ahead is of the whole text"),
    ("infill @/new --text a[[3]] --hole b --matching ab", "infill: --hole says what fills the holes, --matching"),
    ("infill @/new --prompts x --hole b", "infill: --hole is of one --text; for the prompts of a file give --matching"),
    ("infill @/new --text a[[3]] --hole bb", "no text of 4 tokens matches 'a(?:bb)': the nearest lengths are 3"),
    ("eval @/new --draws 0", "sedd-graph eval: argument --draws: must be from 1 to 4,096, not 0;"),
    ("eval @/new --batches 0", "sedd-graph eval: argument --batches: must be from 1 to 1,000,000,000, not 0;"),
    ("train @/nowhere", "@/nowhere is not a run folder: there is no blueprint.lock.yaml in it"),
    ("train @/new --resume", "there is no checkpoint under @/new/checkpoints to resume from"),
    ("train @/new train.steps=3", "the blueprint of a run folder is locked: give overrides to `sedd-graph build`"),
    ("train @/new.yaml --resume", "@/new.yaml is a blueprint: --resume takes a run folder"),
    ("train @/trained", "@/trained has been trained already: add --resume to continue, or build a new run"),
    ("build @/nowhere.yaml", "@/nowhere.yaml: no such file"),
    ("build @/empty", "@/empty: not a file"),
    ("build @/new.yaml --compile fast", "sedd-graph build: argument --compile: invalid choice: 'fast'"),
    ("build @/new.yaml --check --frobnicate", "sedd-graph: unrecognized arguments: --frobnicate"),
    (
        "build @/new.yaml --check train.stepz=1",
        "override 'train.stepz=1': train.stepz: unknown key (did you mean 'steps'?)",
    ),
    ("build @/new.yaml --runs @/file", "a folder could not be written to @/file/small: Not a directory"),
    ("show @/nowhere", "@/nowhere: no such file"),
    ("show @/empty", "@/empty/blueprint.lock.yaml: no such file"),
    ("show @/new --format pdf", "sedd-graph show: argument --format: invalid choice: 'pdf'"),
    ("components atention", "unknown op 'atention' (did you mean 'attention'?); `sedd-graph components` lists them"),
    ("components a b", "sedd-graph: unrecognized arguments: b"),
    ("schema -o @/empty", "empty could not be written to @: Is a directory"),
    ("schema -o @/no/x.json", "x.json could not be written to @/no: No such file or directory"),
    ("import gpt @/file", "sedd-graph import: argument kind: invalid choice: 'gpt'"),
    ("import sedd @/nowhere", "@/nowhere: no such file or folder"),
    ("import sedd @/file", "@/file cannot be read as plain weights, and nothing else is loaded from a file"),
    ("import sedd @/empty", "@/empty holds neither model.safetensors nor pytorch_model.bin"),
    ("export @/new", "sedd-graph export: the following arguments are required: -o/--output"),
    ("export @/new -o @/file", "@/file exists already; choose another folder"),
    ("export @/new -o @/new", "@/new exists already; choose another folder"),
    ("export @/new -o @/file/out", "model.safetensors could not be written to @/file/out: Not a directory"),
]


@pytest.mark.parametrize(
    ("arguments", "said"), FAULTS, ids=[f"{i}-{a.split(' ')[0]}" for i, (a, _) in enumerate(FAULTS)]
)
def test_a_fault_is_one_sentence(place: Path, arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments.replace("@", str(place)).split()
    if words[:1] in (["sample"], ["infill"], ["train"], ["eval"], ["build"], ["export"]) and "--device" not in words:
        words += ["--device", "cpu"]
    before = listing(place)
    assert run(words) == 2
    found = capsys.readouterr().err
    assert found.startswith(said.replace("@", str(place)))
    assert found.count("\n") == 1
    assert listing(place) == before


BROKEN = [
    ("bare", "blueprint.lock.yaml", "a: [", "sample @", r"@/blueprint\.lock\.yaml:2:1: not YAML"),
    ("new", "blueprint.lock.yaml", "a: [", "sample @", r"@/blueprint\.lock\.yaml has 4 bytes, not the 2,\d\d\d that were written"),
    ("new", "blueprint.lock.yaml", None, "eval @", r"@ is not a run folder: there is no blueprint\.lock\.yaml in it"),
    ("bare", "tokenizer.json", "{", "sample @", r"@/tokenizer\.json: not JSON"),
    ("bare", "tokenizer.json", '{"kind": "bytes"}', "train @", r"data\.tokenizer has 257 tokens, more than the 128"),
    ("new", "tokenizer.json", '{"kind": "bytes"}', "train @", r"@/tokenizer\.json has 17 bytes, not the 202 that were written"),
    ("new", "tokenizer.json", None, "sample @", r"@/tokenizer\.json is missing"),
    ("new", "manifest.json", "{", "sample @", r"@/manifest\.json is not JSON"),
    ("new", "manifest.json", '{"files": {"run.json": {"bytes": -1}}}', "sample @", r"@/manifest\.json: files\.run\.json\.bytes: "),
    ("bare", "run.json", "{", "sample @", r"@/run\.json is not JSON"),
    ("bare", "run.json", '{"root": 3}', "sample @", r"@/run\.json: root: "),
    ("bare", "certificate.json", '{"checkpointed": "all"}', "sample @", r"@/certificate\.json: checkpointed: "),
    ("trained", "checkpoints/*/state.json", "[]", "train @ --resume", r"no checkpoint under @/checkpoints is whole, .*step-00000006/state\.json has 2 bytes, .*step-00000003/"),
    ("trained", "checkpoints/*/model.safetensors", "abc", "train @ --resume", r".*model\.safetensors has 3 bytes, not the"),
    ("trained", "checkpoints/*/optimizer.safetensors", None, "train @ --resume", r".*optimizer\.safetensors is missing"),
    ("trained", "checkpoints/*/manifest.json", None, "train @ --resume", r".*manifest\.json is missing"),
    ("trained", "checkpoints/step-00000006/ema.safetensors", "abc", "sample @", r".*ema\.safetensors has 3 bytes, not the .* that were written \(manifest\.json\); `sedd-graph train @ --resume` goes back to the newest"),
    ("trained", "checkpoints/step-00000006/model.safetensors", None, "sample @ --weights model", r".*model\.safetensors is missing"),
    ("trained", "checkpoints/step-00000006/manifest.json", None, "sample @", r".*manifest\.json is missing"),
    ("bare", "run.json", None, "train @", r"@ is not a whole run folder: there is no run\.json in it"),
    ("new", "run.json", None, "train @", r"@/run\.json is missing: manifest\.json lists it"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "file", "text", "arguments", "said"), BROKEN, ids=[f"{c[1].split('/')[-1]}-{c[3].split()[0]}-{i}" for i, c in enumerate(BROKEN)])  # fmt: skip
def test_a_broken_run_folder_is_one_sentence(
    place: Path,
    tmp_path: Path,
    source: str,
    file: str,
    text: str | None,
    arguments: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(place / ("new" if source == "bare" else source), tmp_path / "run")
    for name in {"manifest.json", "run.json"} - {file} if source == "bare" else ():
        (folder / name).unlink()
    for path in sorted(folder.glob(file)):
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
    assert run([*arguments.replace("@", str(folder)).split(), "--device", "cpu"]) == 2
    found = capsys.readouterr().err
    assert re.match(said.replace("@", re.escape(str(folder))), found)
    assert found.count("\n") == 1


def test_no_memory_is_a_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", str(place / "new"), "--batch", "65536", "--length", "1048576", "--device", "cpu"]
    before = listing(place)
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert re.match(
        r"this request needs about [\d,.]+ GiB, more than the [\d,.]+ GiB memory .*; .* would fit", said.err
    )
    assert said.out.startswith("sampling    65,536 rows of up to 1,048,576 tokens in 9 steps: at least ")
    assert run([*arguments, "--ignore-memory"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("out of memory: take fewer or shorter rows (--batch, --length;")
    assert "warning     this request needs about " in said.out
    assert run(["sample", str(place / "new"), "--steps", "1000000", "--length", "1048576", "--trajectory"]) == 2
    assert listing(place) == before


def test_samples_are_shown_before_a_full_disk_loses_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> Path:
        raise EnvironmentFault("samples.zarr could not be written: the disk is full")

    monkeypatch.setattr("sedd_graph.runs.sample.write_samples", full)
    monkeypatch.setattr("sedd_graph.runs.open.Run.decode", lambda self, rows: ["a\x1b[2Jb"] * len(rows))
    before = listing(place)
    assert run(["sample", str(place / "new"), "--batch", "2", "--steps", "2", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert said.out == "--- 0\na\\x1b[2Jb\n--- 1\na\\x1b[2Jb\n"
    assert said.err == "samples.zarr could not be written: the disk is full\n"
    monkeypatch.setattr("sedd_graph.runs.sample.os.access", lambda path, mode: False)
    assert run(["sample", str(place / "new"), "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"{place / 'new'} is read-only, so samples cannot be stored in it")
    assert said.out == ""
    assert listing(place) == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_a_path_that_is_not_utf_8_is_refused_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = place / os.fsdecode(b"caf\xe9")
    shutil.copytree(place / "new", odd)
    shutil.copy(place / "new.yaml", odd)
    before = sorted(os.listdir(os.fsencode(odd)))
    said = f"{place}/caf\\xe9: this path is not UTF-8, which files of weights need: rename the folder\n"
    for arguments in (
        ["sample", str(odd)],
        ["train", str(odd)],
        ["build", str(place / "new.yaml"), "--runs", str(odd)],
        ["build", str(odd / "new.yaml"), "--runs", str(place / "runs")],
    ):
        assert run([*arguments, "--device", "cpu"]) == 2
        assert capsys.readouterr().err == said
    assert sorted(os.listdir(os.fsencode(odd))) == before
    shutil.rmtree(odd)


def test_overrides_may_stand_behind_options(small: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(small()), "params.dim=32", "--check", "params.depth=3"]) == 0
    assert "layer x 3" in capsys.readouterr().out


def test_one_held_out_row_has_a_bound_without_an_error(tmp_path: Path) -> None:
    """Of one value there is no standard error; JSON has no NaN."""
    (tmp_path / "one.txt").write_text("abcd " * 80)
    corpus = "data: {corpus: {op: text, files: [one.txt]}, "
    (tmp_path / "one.yaml").write_text(
        SMALL.replace("data: {", corpus).replace("evaluate: null", "evaluate: {every: 2}")
    )
    runs = ["--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert run(["train", str(tmp_path / "one.yaml"), *runs]) == 0
    (folder,) = (tmp_path / "runs" / "small").iterdir()
    found = json.loads((folder / "evaluation.json").read_text())
    assert (found["sequences"], found["standard_error"], found["bits_standard_error"]) == (1, None, None)
    assert found["nats_per_token"] > 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["heldout_standard_error"] for r in records if "heldout_standard_error" in r] == [None, None]
    assert "held out" in (folder / "report.html").read_text()
