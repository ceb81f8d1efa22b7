"""Components by entry point, with packages that are only a dist-info folder and a module (tests/data/plugins)."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jaxtyping import Float
from torch import Tensor

from sedd_graph.cli import main as cli
from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.describe import describe, list_components
from sedd_graph.component.registry import GROUP, PluginWarning, Registry, discover
from sedd_graph.errors import BlueprintError, EnvironmentFault, UserError
from sedd_graph.runs.check import check

PLUGINS = Path(__file__).parents[1] / "data" / "plugins"
BADLY_NAMED = "stranger 1.0: entry point 'Triple' is not named like 'attention.v1'; left out"


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """Everything that is installed, and the stranger's package."""
    monkeypatch.syspath_prepend(PLUGINS / "stranger")
    monkeypatch.setattr(sys, "burned", 0, raising=False)
    with pytest.warns(PluginWarning) as caught:
        registry = discover()
    assert [str(w.message) for w in caught] == [BADLY_NAMED]
    yield registry
    for name in ("stranger", "stranger_burns"):
        sys.modules.pop(name, None)


def test_discovery_imports_nothing() -> None:
    code = f"""
import sys, warnings
sys.path.insert(0, {str(PLUGINS / "stranger")!r})
warnings.simplefilter("ignore")
from sedd_graph.component.registry import discover
registry = discover()
assert {{"attention", "triple", "burns"}} <= set(registry.names)
assert registry.entry("triple").distribution == "stranger 1.0"
bad = [m for m in sys.modules if m.split(".")[0] in ("torch", "stranger", "stranger_burns", "sedd_graph_registry")]
assert not bad, bad
registry.contract("triple")
assert "stranger" in sys.modules and "stranger_burns" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_built_in_component_comes_through_the_same_door() -> None:
    from importlib.metadata import entry_points

    registry = discover()
    own = {
        p.name
        for p in entry_points(group=GROUP)
        if p.dist is not None and p.dist.name.replace("-", "_") == "sedd_graph"
    }
    assert own <= {e.op for e in registry}
    for entry in registry:
        contract = registry.contract(entry.op)
        assert (contract.op, contract.config) == (entry.op, registry.component(entry.op).Config)
        file, line = registry.place(entry.op)
        assert Path(file).read_text().splitlines()[line - 1].startswith("class ")


def test_a_broken_plugin_warns_once_and_the_rest_go_on(stranger: Registry) -> None:
    with pytest.warns(PluginWarning) as caught:
        contracts = stranger.contracts()
    start = "component {!r} of stranger 1.0 cannot be loaded: "
    assert [str(w.message).partition("<function")[0] for w in caught] == [
        start.format("absent.v1") + "ModuleNotFoundError: No module named 'stranger_that_is_not_there'",
        start.format("burns.v1") + "SystemError: it burns",
        start.format("plain.v1") + "TypeError: ",
    ]
    assert {"triple.v1", "triple.v2", "attention.v1"} <= {c.op for c in contracts}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [c.op for c in stranger.contracts()] == [c.op for c in contracts]
    with pytest.raises(EnvironmentFault, match="it burns"):
        stranger.component("burns")
    assert sys.burned == 1


def test_versions(stranger: Registry) -> None:
    assert stranger.contract("triple").op == "triple.v2"
    assert stranger.component("triple.v1").__name__ == "Triple"
    for op, message in {
        "triple.v3": "op 'triple' has no version 3; installed: triple.v1, triple.v2",
        "tripel": r"unknown op 'tripel' \(did you mean 'triple'\?\); `sedd-graph components` lists them",
    }.items():
        with pytest.raises(UserError, match=message):
            stranger.entry(op)
    assert "Three times the input, by addition." in describe("triple", stranger)


def test_the_list_shows_what_loads(stranger: Registry, recwarn: pytest.WarningsRecorder) -> None:
    shown = list_components(stranger)
    assert "triple.v2" in shown
    assert "[stranger 1.0]" in shown
    assert "burns" not in shown
    assert len([w for w in recwarn if issubclass(w.category, PluginWarning)]) == 3


def test_a_broken_component_in_a_blueprint_is_named_with_its_place(
    stranger: Registry, small: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(PluginWarning, match="entry point 'Triple'"):
        assert check(small(("op: rms_norm", "op: triple"))).graph.root.size == 2 + 2 * 5
    with pytest.warns(PluginWarning, match="entry point 'Triple'"), pytest.raises(BlueprintError) as error:
        check(small(("op: rms_norm", "op: burns")))
    (problem,) = error.value.problems
    assert (problem.line, problem.path) == (13, "blocks.layer.nodes.norm.op")
    assert problem.message == "component 'burns.v1' of stranger 1.0 cannot be loaded: SystemError: it burns"
    # nothing is wrong with the blueprint, unless there is something else
    for beside, code in (("", 1), ("\n      other: {op: rmsnorm, in: x}", 2)):
        path = small(("norm: {op: rms_norm, in: x}", "norm: {op: burns, in: x}" + beside))
        with pytest.warns(PluginWarning, match="entry point 'Triple'"):
            assert cli.run(["build", str(path), "--check"]) == code
        assert "it burns" in capsys.readouterr().err


def test_a_name_registered_twice_is_an_error(monkeypatch: pytest.MonkeyPatch, stranger: Registry) -> None:
    monkeypatch.syspath_prepend(PLUGINS / "rival")
    with pytest.warns(PluginWarning, match="entry point 'Triple'"), pytest.raises(EnvironmentFault) as error:
        discover()
    assert str(error.value) == (
        "component 'triple.v1' is registered twice, by rival 2.0 and by stranger 1.0; "
        "uninstall one or ask its author for another name"
    )


def test_registries_made_by_hand() -> None:
    class One(Component, kind="arithmetic"):
        class Config(ComponentConfig):
            pass

        def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
            return x

    class Two(One):
        pass

    one = Registry.of({"it": One, "it.v2": Two})
    assert [e.op for e in one] == ["it.v1", "it.v2"]
    assert (one | one).component("it.v1") is One
    with pytest.raises(EnvironmentFault, match="registered twice"):
        one | Registry.of({"it": Two})
    with pytest.raises(UserError, match="component name 'It' is not like"):
        Registry.of({"It": One})
    with pytest.raises(EnvironmentFault, match="is not a Component class"):
        Registry.of({"it": object}).component("it")
