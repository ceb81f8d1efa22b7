"""The table of kinds, what every class declares, names that changed, and descriptions of Config keys."""

from pathlib import Path
from typing import Annotated, Any

import pydantic
import pytest
from jaxtyping import Float
from torch import Tensor, nn

from sedd_graph.blueprint.load import load
from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.component.contract import SizeField
from sedd_graph.component.declared import Declared
from sedd_graph.component.describe import describe, list_components
from sedd_graph.component.fields import field_descriptions, type_text
from sedd_graph.component.kinds import KINDS, kinds_at, require_kind
from sedd_graph.component.registry import Registry, discover
from sedd_graph.data.config import DataConfig
from sedd_graph.data.sources import Corpus
from sedd_graph.errors import BlueprintError, UserError
from sedd_graph.graph.expand import expand
from sedd_graph.inverse.flat import flatten
from tests.conftest import SMALL

REGISTRY = discover()


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda k: k.name)
def test_base_class_and_check_of_every_kind_are_there(kind: Any) -> None:
    assert issubclass(kind.base_class(), Declared)
    assert callable(kind.checker())


def test_every_component_derives_from_the_base_of_its_kind() -> None:
    for contract in REGISTRY.contracts():
        assert issubclass(REGISTRY.component(contract.op), KINDS[contract.kind].base_class()), contract.op


def test_places_and_families() -> None:
    assert kinds_at("process") == ("kernel", "string_kernel", "vector_kernel")
    assert kinds_at("sample") == ("sampler", "string_sampler", "vector_sampler")
    families = {name: kind.family for name, kind in KINDS.items() if kind.family is not None}
    assert families["kernel"] == "tokens"
    assert families["string_objective"] == "strings"
    assert families["likelihood"] == families["points"] == "points"


def test_a_class_is_refused_when_it_is_defined() -> None:
    with pytest.raises(TypeError, match=r"unknown kind 'kernal' \(did you mean 'kernel'\?\)"):

        class Misspelt(Component, kind="kernal"):
            class Config(ComponentConfig):
                pass

    with pytest.raises(TypeError, match="kind 'edit_kernel' is now called 'string_kernel'"):

        class Old(Component, kind="edit_kernel"):
            class Config(ComponentConfig):
                pass

    with pytest.raises(TypeError, match="kind 'corpus' derives from sedd_graph"):

        class Baseless(Component, kind="corpus"):
            class Config(ComponentConfig):
                pass

    with pytest.raises(TypeError, match="needs a nested class Config"):

        class Bare(Corpus, kind="corpus"):
            def documents(self, root: Path) -> Any:
                return iter(())


@pytest.mark.parametrize(
    ("old", "new"),
    [("first_hitting", "string_first_hitting"), ("tau", "string_tau"), ("thinning.v1", "string_thinning")],
)
def test_an_op_that_was_renamed_is_refused_with_its_new_name(old: str, new: str) -> None:
    with pytest.raises(UserError, match=f"is now called '{new}'"):
        REGISTRY.entry(f"edit_{old}")


def test_kinds_that_were_renamed() -> None:
    for old in ("edit_kernel", "edit_objective", "edit_sampler"):
        with pytest.raises(UserError, match=f"is now called '{old.replace('edit', 'string')}'"):
            require_kind(old)


class Heavy(Component, kind="arithmetic"):
    """Of a kind whose components mostly sum, but with a network inside."""

    class Config(ComponentConfig):
        pass

    def __init__(self, config: ComponentConfig, context: Any) -> None:
        super().__init__(config, context)
        self.inner = nn.Linear(self.axis("d"), self.axis("d"))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return self.inner(x)


def test_the_solver_counts_a_heavy_component_of_kind_arithmetic(tmp_path: Path) -> None:
    """What is free follows from what a component declares of itself, not from its kind."""
    path = tmp_path / "heavy.yaml"
    path.write_text(SMALL.replace("norm: {op: rms_norm", "norm: {op: heavy"))
    found = flatten(expand(load(path), Registry.of({"heavy": Heavy}) | REGISTRY).root)
    costs = {node.op.contract.name: node.cost for node in found.nodes}
    assert costs["heavy"] == costs["attention"] == 1.0
    assert costs["add"] == 0.0


# -- descriptions ---------------------------------------------------------------------------------------------------


class Inner(ComponentConfig):
    """Keys within a key."""

    depth: int = 1
    """How deep."""


class Base(ComponentConfig):
    first: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.5
    """The first,
    on two lines."""


class Derived(Base):
    second: int = pydantic.Field(2, description="The second.")
    silent: bool = False
    inner: Inner | None = None
    """Something within."""


def test_descriptions_come_from_docstrings_of_the_class_and_its_bases() -> None:
    assert field_descriptions(Derived) == {
        "first": "The first, on two lines.",
        "second": "The second.",
        "inner": "Something within.",
    }


def test_types_in_words() -> None:
    texts = {n: type_text(f.annotation, f.metadata) for n, f in Derived.model_fields.items()}
    assert texts == {"first": "float, above 0, at most 1", "second": "int", "silent": "bool", "inner": "Inner or null"}
    assert type_text(SizeField) == f"int, or an expression over axes, above 0, below {2**40}"


def test_describe_prints_choices_defaults_bounds_and_meaning() -> None:
    text = describe("muon", REGISTRY)
    assert text.startswith("muon.v1 (optimizer, train.optimizer)\n")
    assert (
        "  momentum = 0.95  (float, at least 0, below 1)\n      Decay rate of the moving average of the gradient, in [0, 1)."
        in text
    )
    assert "(a component of train.optimizer)" in text
    assert "  mode = 'halves'  (halves | interleave)" in describe("split_sequence", REGISTRY)
    assert "files required  (list of (str, " in describe("jsonl", REGISTRY)


def test_the_list_goes_by_kind_and_names_the_place() -> None:
    lines = list_components(REGISTRY).splitlines()
    kinds = [line.split(" ")[0] for line in lines if not line.startswith(" ")]
    assert kinds == [k for k in KINDS if any(c.kind == k for c in REGISTRY.contracts())]
    assert "tokenizer (data.tokenizer)" in lines


def test_every_key_of_the_data_train_and_store_sections_has_a_description() -> None:
    from sedd_graph.runs.check import SECTIONS

    models = [model for section in SECTIONS.values() for model in section]
    models += [c.config for c in REGISTRY.contracts() if KINDS[c.kind].place.split(".")[0] in SECTIONS]
    silent = [(m.__qualname__, n) for m in models for n in m.model_fields if n not in field_descriptions(m)]
    assert silent == []


WITHOUT = 36
"""Properties of the schema that have no description yet. It only goes down."""


def test_properties_of_the_schema_have_descriptions() -> None:
    import json

    from sedd_graph.runs.check import schema_text

    silent = []

    def visit(schema: Any, path: str) -> None:
        if isinstance(schema, list):
            for index, inner in enumerate(schema):
                visit(inner, f"{path}[{index}]")
        elif isinstance(schema, dict):
            for name, inner in schema.get("properties", {}).items():
                if "description" not in inner and not (path.startswith("$defs.Node.allOf") and name in ("op", "with")):
                    silent.append(f"{path}.{name}")
            for key, inner in schema.items():
                visit(inner, f"{path}.{key}".lstrip("."))

    visit(json.loads(schema_text()), "")
    assert len(silent) <= WITHOUT, silent


# -- components chosen in a section -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{op: characters, size: 128}", "{op: charcters}", r"data.tokenizer: unknown op 'charcters' \(did you mean 'characters'\?\); known: bpe, bytes, characters, file"),
        ("{op: characters, size: 128}", "{op: adamw}", "data.tokenizer: 'adamw' is of kind optimizer; known: bpe"),
        ("{op: characters, size: 128}", "{op: characters.v9}", "op 'characters' has no version 9"),
        ("{op: characters, size: 128}", "{op: characters, sice: 8}", r"data.tokenizer.sice: unknown key \(did you mean 'size'\?\); known: alphabet, op, size"),
        ("{op: characters, size: 128}", "{size: 128}", "data.tokenizer: needs the key 'op'"),
        ("{op: characters, size: 128}", "3", "data.tokenizer: must be a mapping, not 3"),
        ("train: {", "train: {schedule: cosine, ", "train.schedule: op 'cosine' is now called 'cosine_decay'"),
        ("train: {", "train: {final: 0.1, ", "'final' is now a key of the schedule"),
        ("train: {", "train: {optimizer: {lrr: 1}, ", r"train.optimizer.lrr: unknown key \(did you mean 'lr'\?\); known: betas, eps, lr, op, weight_decay"),
        ("train: {", "train: {optimizer: {op: muon, adamw: {op: muon}}, ", "train.optimizer.adamw: 'muon' is not of class AdamW"),
        ("train: {", "train: {trackers: [wandbb], ", r"train.trackers\[0\]: unknown op 'wandbb' \(did you mean 'wandb'\?\)"),
    ],
)  # fmt: skip
def test_what_is_no_component_of_the_place_is_refused_there(tmp_path: Path, old: str, new: str, message: str) -> None:
    from sedd_graph.runs.check import check

    path = tmp_path / "wrong.yaml"
    assert old in SMALL
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(BlueprintError, match=message):
        check(path)


def test_a_section_is_written_after_sys_path_has_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch.compile adds a folder to ``sys.path``, for which another registry is made."""
    read = DataConfig.model_validate({"corpus": "builtin", "tokenizer": {"op": "bytes"}})
    before = read.model_dump(mode="json")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read.model_dump(mode="json") == before
    assert before["corpus"] == {"op": "builtin.v1"}
