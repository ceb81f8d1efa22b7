"""Files around the code: licence, version, citation, changelog, continuous integration, hooks and their links."""

import ast
import hashlib
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import sedd_graph
from tests.conftest import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
PAGES = [ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")]

APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""SHA-256 of the text at apache.org, in which the owner is a placeholder."""

CFF_REQUIRED = {"authors", "cff-version", "message", "title"}
CFF_OPTIONAL = {"abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license", "license-url", "preferred-citation", "references", "repository", "repository-artifact", "repository-code", "type", "url", "version"}  # fmt: skip
"""Top-level keys of the Citation File Format 1.2.0."""


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_licence_is_apache_2_and_is_said_so_everywhere() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    owner = re.search(r"Copyright (\d{4}) the sedd_graph authors", text)
    assert owner is not None
    blank = text.replace(owner[0], "Copyright [yyyy] [name of copyright owner]")
    assert hashlib.sha256(blank.encode()).hexdigest() == APACHE_2
    project = PROJECT["project"]
    assert project["license"] == read(ROOT / "CITATION.cff")["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE"]
    assert project["authors"] == [{"name": "the sedd_graph authors"}]


def test_the_version_has_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "sedd_graph.__version__"}}
    assert "version" not in read(ROOT / "CITATION.cff")
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", sedd_graph.__version__)
    tree = ast.parse((ROOT / "sedd_graph" / "__init__.py").read_text(encoding="utf-8"))
    named = [ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign) and "__version__" in ast.unparse(node.targets[0])]  # fmt: skip
    assert named == [repr(sedd_graph.__version__)]  # a literal: setuptools reads it without importing torch


def test_the_citation_has_the_keys_of_its_format() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation.keys() <= CFF_REQUIRED | CFF_OPTIONAL
    assert citation.keys() >= CFF_REQUIRED
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] in ("software", "dataset")
    assert all(isinstance(author.get("name"), str) for author in citation["authors"])


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\S*\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    sections = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= sections


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_scripts_of_the_pages_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for name in re.findall(r"\bscripts/[\w-]+", text):
        assert (ROOT / name).is_file(), name
    for folder in re.findall(r"^\| `([\w/]+)/` \|", text, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_only_call_scripts(path: Path) -> None:
    """So that each job can be run by hand; and none has more than read access."""
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow[True]  # YAML 1.1 reads the key "on" as true
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 300
        steps = job["steps"]
        assert [step["run"] for step in steps if "run" in step]
        for step in steps:
            assert ("run" in step) != ("uses" in step)
            if "run" in step:
                script = ROOT / step["run"]
                assert script.parent == ROOT / "scripts"
                assert os.access(script, os.X_OK)
            else:
                assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])


def test_tests_run_on_every_python_that_is_named() -> None:
    tested = read(GITHUB / "workflows" / "tests.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    named = [c.rpartition(" :: ")[2] for c in PROJECT["project"]["classifiers"] if ":: 3." in c]
    assert tested == named
    assert PROJECT["project"]["requires-python"] == f">={tested[0]}"


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_templates_are_forms(path: Path) -> None:
    form = read(path)
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= form.keys()
    fields = form["body"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in fields)


def test_hooks_use_the_tools_of_the_test_extra() -> None:
    tools = {re.split(r"[>\[]", name)[0] for name in PROJECT["project"]["optional-dependencies"]["test"]}
    (local,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    commands = [hook["entry"].split()[0] for hook in local["hooks"]]
    assert all(command.startswith(".venv/bin/") for command in commands)
    names = {command.rpartition("/")[2] for command in commands}
    assert names == {"ruff", "mypy", "lint-imports"}
    assert tools >= (names - {"lint-imports"}) | {"import-linter"}
    script = (ROOT / "scripts" / "test").read_text(encoding="utf-8")
    assert all(f".venv/bin/{name}" in script for name in names)
