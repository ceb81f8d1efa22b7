"""``sedd-graph export --format transformers``: the generated code, its agreement with the run, and what is refused."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from sedd_graph.blueprint.shipped import shipped_files
from sedd_graph.cli import main as cli
from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField
from sedd_graph.component.exported import exported_as
from sedd_graph.component.registry import installed
from sedd_graph.errors import SeddGraphError, UserError
from sedd_graph.runs.export import export_run
from sedd_graph.runs.open import Run, open_run
from sedd_graph.runs.plain.agreement import _opened, _package, largest_difference
from sedd_graph.runs.plain.component_source import ComponentSource
from sedd_graph.runs.plain.folder import export_transformers, write_shards
from sedd_graph.runs.plain.names import Names, NotExportable
from sedd_graph.runs.weight_files import read_tensors
from tests.runs.exports import SMALL, random_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return random_run(tmp_path_factory.mktemp("export") / "run", "mdlm-tiny", *SMALL, "params.cond=16")


@pytest.fixture(scope="module")
def exported(run: Run) -> Path:
    pytest.importorskip("transformers", reason="the extra 'hub' is not installed")
    folder = run.path.parent / "out"
    done = export_run(run.path, folder, device=CPU, format="transformers")
    assert done.difference is not None
    assert done.difference <= 1e-5
    return folder


def test_the_code_imports_torch_transformers_and_the_standard_library_alone(exported: Path) -> None:
    names = set()
    for file in exported.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").partition(".")[0])
    assert names <= {"torch", "transformers", *sys.stdlib_module_names}
    assert not any("exec(" in file.read_text() or "eval(" in file.read_text() for file in exported.glob("*.py"))


def test_one_class_a_block_whose_forward_has_the_edges_of_the_graph(exported: Path) -> None:
    text = (exported / "modeling_mdlm_tiny.py").read_text()
    assert text.count("class DitAttend(") == text.count("class DitLayer(") == text.count("class LayerNorm(") == 1
    assert "        self.trunk = nn.ModuleList(DitLayer() for _ in range(2))\n" in text
    assert "        modulate = self.modulate(norm, c)\n        attention = self.attention(modulate, angles)\n" in text
    assert "counter" not in text  # of dropout in training
    assert "def dropout" not in text


def test_config_and_tokenizer_files(exported: Path, run: Run) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["auto_map"]["AutoModelForMaskedLM"] == "modeling_mdlm_tiny.MdlmTinyForMaskedLM"
    assert (config["vocab_size"], config["mask_token_id"], config["model_type"]) == (129, 128, "mdlm_tiny")
    assert json.loads((exported / "tokenizer_config.json").read_text())["mask_token"] == "[MASK]"
    generation = json.loads((exported / "generation_config.json").read_text())
    assert (generation["sampler"], generation["steps"]) == ("ancestral", 128)
    assert run.tokenizer is not None
    assert generation["suppress_tokens"] == list(run.tokenizer.forbidden)
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: fill-mask\n")
    assert "https://arxiv.org/abs/2406.07524" in card


def test_an_export_is_read_back(exported: Path, run: Run, tmp_path: Path) -> None:
    assert cli.run(["import", "export", str(exported), "-o", str(tmp_path / "back")]) == 0
    back = open_run(tmp_path / "back", device=CPU, compile="off")
    assert torch.equal(back.engine.sample(2, 16, seed=0, steps=4), run.engine.sample(2, 16, seed=0, steps=4))
    assert back.tokenizer is not None
    assert run.tokenizer is not None
    assert back.tokenizer.to_json() == run.tokenizer.to_json()


def test_every_sampler_draws_the_tokens_of_the_run(exported: Path, run: Run) -> None:
    from transformers import GenerationConfig

    process: Any = run.engine.process
    text, own, found = (exported / "generation_mdlm_tiny.py").read_text(), process.parts, {}
    with _package(exported):
        model = _opened(exported)
        model.generation_config = GenerationConfig.from_pretrained(exported)
        for contract in installed().contracts():
            if contract.kind != "sampler" or f"    '{contract.name}': lambda" not in text:
                continue
            cls: Any = installed().component(contract.op)
            sampler = cls(cls.Config(), Context({"n": process.kernel.states}))
            process.parts = own._replace(sampler=sampler)
            steps = None if sampler.steps is None else 3
            rows = run.engine.sample(2, 4, seed=5, steps=steps)
            process.parts = own
            made = model.generate(length=4, batch_size=2, seed=5, sampler=contract.name, steps=steps)
            found[contract.name] = torch.equal(made, rows)
    assert len(found) == 11
    assert all(found.values()), found


@pytest.mark.parametrize(
    ("name", "op"), [("mdlm-tiny", "ancestral"), ("mdlm-tiny", "psi"), ("bd3lm-tiny", "ancestral")]
)
def test_systematic_positions_are_exported(name: str, op: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra 'hub' is not installed")
    from transformers import GenerationConfig

    small = SMALL if name == "mdlm-tiny" else ()
    made = random_run(tmp_path / "run", name, *small, f"sample={{op: {op}, positions: systematic}}")
    export_run(made.path, tmp_path / "out", device=CPU, format="transformers")
    assert (
        f"\"spread\": sampler in ('{op}',)," in (tmp_path / "out" / f"modeling_{name.replace('-', '_')}.py").read_text()
    )
    with _package(tmp_path / "out"):
        model = _opened(tmp_path / "out")
        model.generation_config = GenerationConfig.from_pretrained(tmp_path / "out")
        rows = made.engine.sample(2, 8, seed=5, steps=3)
        assert torch.equal(model.generate(length=8, batch_size=2, seed=5, steps=3), rows)


def test_code_that_computes_something_else_is_not_accepted(exported: Path, run: Run, tmp_path: Path) -> None:
    for file in exported.iterdir():
        text = file.read_bytes()
        if file.name.startswith("modeling"):
            assert text.count(b"return residual + gated") == 1
            text = text.replace(b"return residual + gated", b"return residual - gated")
        (tmp_path / file.name).write_bytes(text)
    process: Any = run.engine.process
    with pytest.raises(SeddGraphError, match="disagree: logits differ by"):
        largest_difference(tmp_path, run.engine.model, process.parts)


def test_text_of_a_blueprint_stays_text(tmp_path: Path) -> None:
    evil = 'A """ model\\\n"""\nimport os\nraise SystemExit("run")\n"""'
    for name, content in shipped_files("mdlm-tiny").items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(
            content.replace("MDLM for a laptop, on characters.", json.dumps(evil)).replace(
                "One layer of SEDD.", json.dumps(evil)
            )
        )
    assert json.dumps(evil) in (tmp_path / "mdlm-tiny.yaml").read_text()
    made = random_run(tmp_path / "run", tmp_path / "mdlm-tiny.yaml", *SMALL, "params.cond=16")
    _, code, _ = export_transformers(made)
    assert len(code.files) == 3
    for text in code.files.values():
        tree = ast.parse(text)
        assert not any(isinstance(node, ast.Name) and node.id in ("os", "SystemExit") for node in ast.walk(tree))


class Turn(Component, kind="arithmetic"):
    """Plugin component whose code needs a library that exports do not have."""

    class Config(ComponentConfig):
        pass

    config: Config

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b d l"]:
        return rearrange(x, "b l d -> b d l")


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight``."""
    return x @ weight


@exported_as(plain)
def faster(x: Tensor, weight: Tensor) -> Tensor:
    return rearrange(x @ weight, "b l d -> b l d")


class Mixed(Component, kind="feedforward"):
    """Plugin component with a base class, switches, numbers and a helper with a mark."""

    class Config(ComponentConfig):
        width: SizeField
        """Width."""
        twice: bool = False
        """True to apply the map twice."""
        scale: float = 1.5
        """Factor."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        hidden = self.config.width * (2 if self.config.twice else 1)
        self.weight = nn.Parameter(torch.eye(self.axis("d"), hidden))

    def forward(self, x: Float[Tensor, "b l d"], c: Float[Tensor, "b d"] | None = None) -> Float[Tensor, "b l w"]:
        if c is not None:
            x = x + c[:, None]
        out = faster(x, self.weight)
        return self.scaled(out) if self.config.twice else out * self.config.scale

    def scaled(self, x: Tensor) -> Tensor:
        return 2 * self.config.scale * x


def source_of(component: Component, *dropped: str) -> tuple[str, Names]:
    names = Names()
    source = ComponentSource(component, names, what="node (mixed)", dropped=dropped)
    source.add("__init__", "forward")
    return source.class_source("Mixed", "nn.Module"), names


def test_a_third_party_component_is_exported_as_its_own_code() -> None:
    text, names = source_of(Mixed(Mixed.Config(width=3), Context({"d": 3})), "c")
    assert "    def __init__(self, width, d, scale):" in text
    assert "        self.weight = nn.Parameter(torch.eye(d, hidden))" in text
    assert "    def forward(self, x):" in text
    assert "return out * self.scale" in text
    assert "scaled" not in text
    assert list(names.functions) == ["plain"]
    twice, _ = source_of(Mixed(Mixed.Config(width=3, twice=True), Context({"d": 3})))
    assert "def scaled(self, x):" in twice
    assert "if c is not None:" in twice


def test_what_cannot_be_exported_is_named() -> None:
    source = ComponentSource(Turn(Turn.Config(), Context({"d": 3})), Names(), what="trunk.0.turn (turn)")
    with pytest.raises(
        NotExportable, match=r"trunk\.0\.turn \(turn\) cannot be exported: it uses 'rearrange' of einops"
    ):
        source.add("forward")


def test_families_without_rows_of_tokens_are_refused(tmp_path: Path) -> None:
    made = random_run(tmp_path / "run", "did-tiny", *SMALL)
    with pytest.raises(UserError, match="its process generates strings"):
        export_run(made.path, tmp_path / "out", device=CPU, format="transformers")
    assert not (tmp_path / "out").exists()


def test_conditions_on_text_are_named_as_left_out(tmp_path: Path) -> None:
    made = random_run(tmp_path / "run", "mdlm-tiny", *SMALL, "params.cond=16", "sample.forbid=[q]")
    _, code, _ = export_transformers(made)
    assert code.left_out == {"forbid": "sample: forbid is not exported: generate draws without conditions on the text"}


def test_weights_are_sharded(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((4,), float(i)) for i in range(5)}
    write_shards(tensors, tmp_path, 32)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 80
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    found = read_tensors(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
