"""README.md and the pages under docs/: blueprints check, Python runs, commands print what is shown, names exist.

The reference pages of the blueprint, of training and of data have tests of their own.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

from sedd_graph.cli import main as cli
from sedd_graph.component.kinds import kinds_at
from sedd_graph.component.registry import discover
from sedd_graph.errors import _LISTED, MAX_PROBLEMS
from sedd_graph.graph.expand import MAX_STEPS
from sedd_graph.runs.check import check
from tests.conftest import BLUEPRINTS, ROOT
from tests.environment import Environment
from tests.pages import DOCS, FENCE, GENERATED, PAGES, blocks, blueprints, title

README = PAGES[0].read_text(encoding="utf-8")
FIRST_COMPONENT, NODE, DECISIONS, MEASUREMENTS, BLUEPRINT = (
    DOCS / f"{name}.md"
    for name in (
        "tutorials/first-component",
        "how-to/node",
        "explanation/decisions",
        "reference/measurements",
        "reference/blueprint",
    )
)
REFUSED = {"mistaken.yaml", "single.yaml"}  # shown for what is said of them
THIRD_PARTY = {"nudge.yaml"}  # needs the package of its page

each_page = pytest.mark.parametrize("page", PAGES, ids=title)


@each_page
def test_yaml_parses_and_blueprints_check(page: Path, tmp_path: Path) -> None:
    for body in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(body), dict)
    shutil.copytree(ROOT / "blueprints" / "blocks", tmp_path / "blocks")
    for name, body in blueprints(page).items():
        if name not in REFUSED | THIRD_PARTY and page != BLUEPRINT:
            (tmp_path / name).write_text(body, encoding="utf-8")
            assert check(tmp_path / name).parameters > 0


def test_the_blueprint_of_the_readme_is_the_shipped_one() -> None:
    shown = yaml.safe_load(blueprints(PAGES[0])["first.yaml"])
    shipped = yaml.safe_load((ROOT / "blueprints" / "first.yaml").read_text(encoding="utf-8"))
    assert shown == {key: shipped[key] for key in shown}


SGLANG = DOCS / "how-to" / "sglang.md"  # needs SGLang: tests/engine/test_block_steps.py runs it beside a stand-in
RUNNABLE = [page for page in PAGES if blocks(page, "python") and page != SGLANG]


@pytest.mark.parametrize("page", RUNNABLE, ids=title)
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """The blocks of a page follow one another, in a process of their own."""
    (tmp_path / "page.py").write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "page.py"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def sessions(page: Path) -> list[tuple[str, str]]:
    """Every command that a page shows with what it prints."""
    found = []
    for body in blocks(page, "console"):
        for part in body.removeprefix("$ ").split("\n$ "):
            command, _, output = part.partition("\n")
            found.append((command, output.rstrip("\n")))
    return found


def pattern(shown: str) -> str:
    """A line that is `...` stands for any lines; numbers with a point or an exponent differ between machines."""
    lines = [re.sub(r"-?\d+(\\\.\d+(e[+\\-]*\d+)?)", r"-?[\\d.e+-]+", re.escape(line)) for line in shown.split("\n")]
    return "\n".join(".*" if line == re.escape("...") else line for line in lines)


SESSIONS = [(page, *session) for page in PAGES for session in sessions(page)]


@pytest.mark.parametrize(("page", "command", "shown"), SESSIONS, ids=[f"{title(p)}: {c}" for p, c, _ in SESSIONS])
def test_commands_print_what_is_shown(
    page: Path, command: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    (tmp_path / "blueprints").symlink_to(ROOT / "blueprints", target_is_directory=True)
    for name, body in blueprints(page).items():
        (tmp_path / name).write_text(body, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    assert program == "sedd-graph"
    if arguments[0] == "build" and "--check" not in arguments:
        arguments += ["--device", "cpu", "--compile", "off"]  # compiling takes long and prints one line
    code = cli.run(arguments)
    output = capsys.readouterr()
    assert code == (2 if REFUSED & set(arguments) else 0)
    printed = (output.err if code else output.out).rstrip("\n")
    assert re.fullmatch(pattern(shown), printed, re.DOTALL), printed


def test_sessions_are_there_and_a_pattern_can_fail() -> None:
    assert {page.stem for page, *_ in SESSIONS} == {"README", "first-model", "invertibility", "read-a-refusal"}
    assert re.fullmatch(pattern("a 1.5e-08 of 12\n...\nc"), "a 2.25e-07 of 12\nb\nb\nc", re.DOTALL)
    assert not re.fullmatch(pattern("a 1.5e-08 of 12\n...\nc"), "a 2.25e-07 of 13\nb\nb\nc", re.DOTALL)
    assert not re.fullmatch(pattern("a.\n...\nc"), "a.\nb\nd", re.DOTALL)


def test_a_package_in_three_files(tmp_path: Path) -> None:
    """The tutorial of a first component, to the letter: its files, its commands."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text(blocks(FIRST_COMPONENT, "python")[0], encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(blocks(FIRST_COMPONENT, "toml")[0], encoding="utf-8")
    (tmp_path / "nudge.yaml").write_text(blueprints(FIRST_COMPONENT)["nudge.yaml"], encoding="utf-8")
    environment = Environment(tmp_path / "venv")
    (commands,) = blocks(FIRST_COMPONENT, "bash")
    installing, *verbs = [shlex.split(line) for line in commands.splitlines()]
    assert installing == ["pip", "install", "-e", "."]
    environment.install("-e", tmp_path)
    fast = {"train": ["--device", "cpu", "train.steps=2", "train.compile=off"]}
    printed = []
    for program, *arguments in verbs:
        assert program == "sedd-graph"
        arguments += fast.get(arguments[0], [])
        printed.append(environment.run("-W", "error", "-m", "sedd_graph", *arguments, cwd=tmp_path))
    described, undone, trained = printed
    # setuptools of some versions write the name with an underscore
    source = (tmp_path / "my_package" / "__init__.py").read_text(encoding="utf-8")
    line = source[: source.index("class Nudge")].count("\n") + 1
    assert f"my-package 0.1.0  {tmp_path / 'my_package' / '__init__.py'}:{line}\n" in described.replace(
        "my_package 0", "my-package 0"
    )
    assert "y = second.inverse(second, first)" in undone
    for holds in ("round_trip", "log_det", "gradients", "recompute"):
        assert re.search(rf"holds  pair\.{holds} ", trained)
    assert "done at step 2" in trained


def test_the_page_of_nodes_names_every_kind() -> None:
    (line,) = re.findall(r"The kinds of nodes are (.*?)\.", " ".join(NODE.read_text(encoding="utf-8").split()))
    assert tuple(re.findall(r"`(\w+)`", line)) == kinds_at("node")


def verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@each_page
def test_verbs_and_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = [line for body in blocks(page, "bash") for line in body.splitlines()]
    code += [command for command, _ in sessions(page)]
    code += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    known = verbs()
    everywhere = {option for parser in known.values() for action in parser._actions for option in action.option_strings}
    for command in code:
        for call in re.findall(r"sedd-graph ([^|#]*)", command.replace("\\|", ",")):
            verb, *rest = call.split() or [""]
            if not verb or verb.startswith("-") or verb == "COMMAND":
                continue
            assert verb in known, f"{command!r}: no command {verb!r}"
            there = {text for action in known[verb]._actions for text in action.option_strings}
            if known[verb].get_default("passes_on"):  # to another program
                continue
            for option in re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", " ".join(rest)):
                assert option in there, f"{command!r}: {verb} has no option {option}"
        if re.match(r"--[a-z]", command):
            assert command.split()[0] in everywhere, command


def test_every_verb_is_in_the_readme() -> None:
    table = "\n".join(line for line in README.splitlines() if line.startswith("| `sedd-graph"))
    assert [verb for verb in verbs() if not re.search(rf"\b{verb}\b", table)] == []


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http:", "https:")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if target.parent.name == "generated":  # its anchors are checked when the site is built
                assert target.stem in (*GENERATED, "rooms"), link
                continue
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@each_page
def test_paths_exist(page: Path) -> None:
    folders = "blueprints|docs|scripts|tests|benchmarks|examples|registry|schema"
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for path in re.findall(rf"(?<![\w/.:-])((?:{folders})/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), path


@each_page
def test_extras_exist(page: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = " ".join(page.read_text(encoding="utf-8").split())
    named = re.findall(r"\bextra `([\w-]+)`", text) + re.findall(r"`([\w-]+)` extra\b", text)
    for several in re.findall(r"Extras: ([^.]*)\.", text):
        named += re.findall(r"`([\w-]+)`", several)
    assert [name for name in named if name not in project["optional-dependencies"]] == []
    if page is PAGES[0]:
        assert set(named) == project["optional-dependencies"].keys() - {"docs", "test", "all"}


def test_the_readme_lists_every_group_and_blueprint() -> None:
    groups = sorted(page.parent.name for page in PAGES if page.name == "index.md" and page.parent != DOCS)
    assert groups == ["explanation", "how-to", "reference", "tutorials"]
    assert [group for group in groups if f"(docs/{group}/index.md)" not in README] == []
    listed = README.split("Blueprints:\n")[1].split("\nDocs:")[0]
    assert set(re.findall(r"`([\w-]+)`", listed)) == {path.stem for path in BLUEPRINTS}


def test_components_that_the_readme_lists_exist() -> None:
    listed = re.findall(r"`(\w+)`", README.split("Components to build with:")[1].split("\n\n")[0])
    registered = {entry.name for entry in discover()}
    assert len(listed) > 10
    assert [name for name in listed if name not in registered] == []


def test_what_the_readme_says_was_measured_has_records() -> None:
    results = ROOT / "benchmarks" / "results"
    record = json.loads((results / "learn.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    said = f"{record['seconds']:.0f} s of training `blueprints/learn.yaml` on tinyshakespeare reach {record['bits_per_character']:.3f} +- {record['bits_standard_error']:.3f} bits per character"
    assert said in " ".join(README.split())
    for line in (results / "train_step.jsonl").read_text(encoding="utf-8").splitlines():
        step = json.loads(line)
        if step["blueprint"] == "sedd-tiny" and step["hardware"].startswith("cpu"):
            assert min(step[f"ratio to plain, {how}"]["median"] for how in ("compiled", "eager")) > 1.1


@pytest.mark.parametrize("name", ["reconstruction", "invertibility", "conditions", "sampler_order"])
def test_tables_of_benchmarks_are_the_recorded_ones(name: str) -> None:
    record = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert record.split("\n", 1)[1].strip() in MEASUREMENTS.read_text(encoding="utf-8")


def test_figures_of_the_decisions() -> None:
    text = " ".join(DECISIONS.read_text(encoding="utf-8").split())
    assert f"Stages stop at {MAX_PROBLEMS} problems, lists of names at {_LISTED}" in text
    assert f"blocks at {MAX_STEPS:,} different nodes" in text
    log_probability = torch.tensor(-10.0, dtype=torch.bfloat16)
    step = log_probability - torch.nextafter(log_probability, torch.tensor(-11.0, dtype=torch.bfloat16))
    assert f"a log probability of -10 in steps of {step.item():.2f}" in text
    sigma = torch.tensor(1e-6)
    theirs = {n: (1 - n / (sigma.exp() - 1 + n)).item() for n in (50_257, 50_258)}
    expm1 = {n: (1 - n / (sigma.expm1() + n)).item() for n in theirs}  # their code takes either, by size
    assert theirs[50_258] == expm1[50_258] == 0
    assert "is 0 for N = 50,258" in text
    assert round(expm1[50_257] * 50_257 / 1e-6, -3) == round(theirs[50_257] * 50_257 / 1e-6, -3) == 3000
    assert "3,000 times too large for N = 50,257" in text
