"""``sedd-graph serve`` on the command line: what it refuses before it listens."""

import sys
from pathlib import Path

import pytest

from sedd_graph.cli import main as cli
from sedd_graph.errors import EnvironmentFault, MissingExtraError
from sedd_graph.runs.serve.server import Address, listen
from tests.runs.unproved import folder_of


def test_without_the_extra_it_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sedd_graph.runs.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(MissingExtraError, match=r"'starlette': pip install 'sedd_graph\[serve\]'"):
        cli.run(["serve", "--debug", "run"])


def test_an_address_in_use_is_a_fault_of_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder_of(tmp_path / "run", "mdlm-tiny", "sample.steps=1")
    with listen(Address("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.run(["serve", str(run), "--port", str(port), "--device", "cpu"]) == 1
        assert f"cannot listen on 127.0.0.1, port {port}: " in capsys.readouterr().err
    with listen(Address("127.0.0.1", port)) as free:  # it was left
        assert free.getsockname()[1] == port
    with pytest.raises(EnvironmentFault, match=r"cannot listen on no such name, port 1: .* choose another --host"):
        listen(Address("no such name", 1))
