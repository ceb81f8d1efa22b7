"""Writes the reference pages that follow from the code, and the picture of the rooms, into ``docs/generated``.

Run by ``conf.py`` at each build; nothing that it writes is committed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import itertools
import re
import subprocess
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic

from sedd_graph.cli import main as cli
from sedd_graph.component.contract import Contract
from sedd_graph.component.registry import Registry, discover
from sedd_graph.errors import SeddGraphError

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from notebook_pages import pages  # noqa: E402

PUBLIC = ("sedd_graph", "sedd_graph.plugin", "sedd_graph.testing.conformance")
"""The modules whose ``__all__`` is the public API."""


def write(folder: Path) -> None:
    """Write every generated page and picture into ``folder``."""
    folder.mkdir(exist_ok=True)
    for name, text in (
        ("cli", cli_page()),
        ("components", components_page()),
        ("keys", keys_page()),
        ("api", api_page()),
        *pages(folder.parent / "notebooks"),
    ):
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # Sphinx reads changed files only
            path.write_text(text, encoding="utf-8")
    script = folder.parents[1] / "scripts" / "architecture"
    subprocess.run([sys.executable, str(script), "--svg", str(folder / "rooms.svg")], check=True, capture_output=True)


# -- the command line ---------------------------------------------------------------------------------------------


def verbs() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (action,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def cli_page() -> str:
    """Every command with its arguments and options."""
    lines = [
        "# Command line",
        "",
        "`sedd-graph COMMAND`, which is the same as `python -m sedd_graph COMMAND`. This page is generated from the argument parser.",
        "[Exit codes and messages](../reference/messages.md) says how a command ends.",
    ]
    for name, parser in verbs().items():
        usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
        lines += ["", f"## {name}", "", f"{_sentence(parser.description or '')}", "", "```text", textwrap.fill(usage, 100, subsequent_indent="    "), "```", "", "| argument | meaning |", "|---|---|"]  # fmt: skip
        lines += [f"| {_argument(action)} | {_cell(_help(action))} |" for action in parser._actions]
    return "\n".join([*lines, ""])


def _argument(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    value = "" if action.nargs == 0 else " " + str(action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()))  # fmt: skip
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _help(action: argparse.Action) -> str:
    text = (action.help or "").strip()
    if action.choices and "choices" not in text and action.nargs != 0:
        text += f" One of {', '.join(f'`{choice}`' for choice in action.choices)}."
    return _sentence(text)


# -- components ---------------------------------------------------------------------------------------------------


def components_page() -> str:
    """Every installed component of this distribution: ports, Config keys and meaning, by kind."""
    registry = discover()
    contracts = [c for c in registry.contracts() if c.distribution.replace("-", "_").startswith("sedd_graph ")]
    lines = [
        "# Components",
        "",
        "Every component that sedd_graph itself registers, by kind, with its ports and the keys of its Config. This page is",
        "generated from the code; `sedd-graph components NAME` prints the same for any installed component, third-party ones",
        "included. The keys stand under `with` at a node of the graph, and beside `op` everywhere else.",
    ]
    for kind in dict.fromkeys(sorted((c.kind for c in contracts), key=_order)):
        lines += ["", f"## {kind.replace('_', ' ')}"]
        for contract in sorted((c for c in contracts if c.kind == kind), key=lambda c: c.op):
            lines += ["", f"### {contract.name}", "", *_component(contract, registry)]
    return "\n".join([*lines, ""])


def _order(kind: str) -> tuple[int, str]:
    """The place of a kind in the table of kinds, or behind it."""
    try:
        from sedd_graph.component.kinds import KINDS
    except ImportError:
        return 0, kind
    return (list(KINDS).index(kind) if kind in KINDS else len(KINDS)), kind


def _component(contract: Contract, registry: Registry) -> Iterator[str]:
    text = inspect.getdoc(registry.component(contract.name)) or contract.summary
    yield _prose(text)
    ports = list(_ports(contract))
    if ports:
        yield from ("", "| port | type |", "|---|---|", *ports)
    if contract.config.model_fields:
        yield from ("", *_fields(contract.config))


def _ports(contract: Contract) -> Iterator[str]:
    required = [name for name, field in contract.config.model_fields.items() if field.is_required()]
    try:
        signature = contract.signature(contract.config.model_construct() if required else contract.config(), {"*": 2})
    except (SeddGraphError, ValueError, TypeError, AttributeError):
        return
    for port in signature.inputs:
        mark = " (optional)" if port.optional else " (any number)" if port.variadic else ""
        yield f"| in `{port.name}`{mark} | `{port.type}` |"
    for port in signature.outputs:
        yield f"| out `{port.name}` | `{port.type}` |"


# -- keys of a blueprint ------------------------------------------------------------------------------------------


def keys_page() -> str:
    """The keys of ``data``, ``train`` and ``store``, and of all that stands in them."""
    from sedd_graph.data.config import DataConfig, PointsConfig
    from sedd_graph.store.config import StoreConfig
    from sedd_graph.training.config import TrainConfig

    lines = [
        "# Keys of data, train and store",
        "",
        "Generated from the models that read these sections. [Data](../reference/data.md) and [training](../reference/training.md)",
        "explain them; [the blueprint](../reference/blueprint.md) explains all other sections.",
    ]
    for title, model in (("data", DataConfig), ("data, for points", PointsConfig), ("train", TrainConfig), ("store", StoreConfig)):  # fmt: skip
        lines += ["", f"## {title}", "", _prose(inspect.getdoc(model) or ""), "", *_fields(model)]
        for inner in _inner(model):
            lines += ["", f"### {_title(inner)}", "", _prose(inspect.getdoc(inner) or ""), "", *_fields(inner)]
    return "\n".join([*lines, ""])


def _inner(model: type[pydantic.BaseModel]) -> list[type[pydantic.BaseModel]]:
    """The models that fields of ``model`` are made of, each once."""
    found: list[type[pydantic.BaseModel]] = []

    def walk(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel) and annotation not in found:
            found.append(annotation)
            for field in annotation.model_fields.values():
                walk(field.annotation)
        for argument in typing.get_args(annotation):
            walk(argument)

    for field in model.model_fields.values():
        walk(field.annotation)
    return found


def _title(model: type[pydantic.BaseModel]) -> str:
    op = model.model_fields.get("op")
    choices = typing.get_args(op.annotation) if op is not None else ()
    return f"op: {choices[0]}" if choices else model.__name__.removesuffix("Config").lower()


def _fields(model: type[pydantic.BaseModel]) -> Iterator[str]:
    """The table of a model's keys."""
    fields = {name: field for name, field in model.model_fields.items() if name != "op"}
    if not fields:
        yield "It has no keys."
        return
    meaning = descriptions(model)
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    for name, field in fields.items():
        default = "required" if field.is_required() else f"`{_value(field.get_default(call_default_factory=True))}`"
        yield f"| `{field.alias or name}` | {_cell(_type(field))} | {_cell(default)} | {_cell(_prose(meaning.get(name, '')))} |"


def descriptions(model: type[pydantic.BaseModel]) -> dict[str, str]:
    """What each field means: its description, or the docstring under it, of whichever class declares it."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if cls in (object, pydantic.BaseModel) or not issubclass(cls, pydantic.BaseModel):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        except (OSError, TypeError):
            continue
        body = typing.cast(ast.ClassDef, tree).body
        for field, text in itertools.pairwise(body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(value))):
                    found[name] = inspect.cleandoc(value)
    found.update({name: field.description for name, field in model.model_fields.items() if field.description})
    return found


def _type(field: Any) -> str:
    """The type of a field in the words of YAML, with its bounds."""
    if (place := _place(field.metadata)) is not None:
        return place
    bounds = [bound for item in field.metadata for bound in _bounds(item)]
    return _names(field.annotation) + (f", {' and '.join(bounds)}" if bounds else "")


def _place(metadata: Iterable[Any]) -> str | None:
    """The words for a field that holds a component, whose metadata names its place in the blueprint."""
    places = [item.place for item in metadata if isinstance(getattr(item, "place", None), str)]
    return f"an `op` of `{places[0]}`" if places else None


def _bounds(item: Any) -> Iterator[str]:
    for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        if getattr(item, name, None) is not None:
            yield (
                f"{sign} {getattr(item, name):g}"
                if isinstance(getattr(item, name), float)
                else f"{sign} {getattr(item, name):,}"
            )


def _names(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        if (place := _place(arguments[1:])) is not None:
            return place
        bounds = [
            bound
            for item in arguments[1:]
            for inner in (item, *getattr(item, "metadata", ()))
            for bound in _bounds(inner)
        ]
        return _names(arguments[0]) + (f", {' and '.join(bounds)}" if bounds else "")
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (list, tuple, set, frozenset):
        return "list of " + " and ".join(dict.fromkeys(_names(a) for a in arguments if a is not ...))
    if origin in (dict, Mapping):
        return "map from " + " to ".join(map(_names, arguments))
    if arguments:
        return " or ".join(dict.fromkeys(_names(a) for a in arguments))
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        title = _title(annotation)
        return f"`{title}`" if title.startswith("op") else f"section `{title}`"
    plain = {int: "integer", float: "number", bool: "true or false", str: "text"}
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _value(value: Any) -> str:
    if isinstance(value, pydantic.BaseModel):
        inner = {name: item for name, item in value.model_dump(mode="json").items() if item != _unset(value, name)}
        return "{" + ", ".join(f"{name}: {_value(item)}" for name, item in inner.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value(item)}" for name, item in value.items()) + "}"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if not isinstance(value, (int, float)) or isinstance(value, bool) else str(value)  # fmt: skip


def _unset(value: pydantic.BaseModel, name: str) -> Any:
    """The default of a field, which a short form leaves out; of nothing that is required."""
    field = type(value).model_fields[name]
    return object() if field.is_required() else field.get_default(call_default_factory=True)


# -- the API ------------------------------------------------------------------------------------------------------


def api_page() -> str:
    """The public names, for autodoc."""
    lines = [
        "# Python API",
        "",
        "The names that are promised to stay: those of `sedd_graph`, of `sedd_graph.plugin` for authors of components, and the",
        "conformance kit. Everything else may change between versions. Generated from docstrings.",
    ]
    seen: dict[int, str] = {}
    for name in PUBLIC:
        module = importlib.import_module(name)
        lines += ["", f"## {name}", "", *_first_paragraph(module.__doc__ or ""), ""]
        again = [public for public in module.__all__ if id(getattr(module, public)) in seen]
        if again:
            lines += [
                f"As in {seen[id(getattr(module, again[0]))]}: {', '.join(f'`{public}`' for public in again)}.",
                "",
            ]
        for public in [public for public in module.__all__ if public not in again]:
            value = getattr(module, public)
            seen[id(value)] = f"`{name}`"
            kind = "class" if inspect.isclass(value) else "function" if callable(value) else "data"
            lines += ["```{eval-rst}", f".. auto{kind}:: {name}.{public}"]
            lines += ["   :members:", "```", ""] if kind == "class" else ["```", ""]
    return "\n".join(lines)


def _first_paragraph(text: str) -> list[str]:
    return [_prose(inspect.cleandoc(text).split("\n\n")[0])]


# -- words --------------------------------------------------------------------------------------------------------


def _sentence(text: str) -> str:
    text = text.strip()
    return text and text[0].upper() + text[1:] + ("" if text.endswith((".", ")")) else ".")


def _prose(text: str) -> str:
    """A docstring as Markdown: roles become code, indented blocks stay code."""
    text = re.sub(r":\w+(?::\w+)?:`~?([^`<]+?)(?: <[^`]*>)?`", r"`\1`", text)
    return text.replace("``", "`").replace("::\n\n    ", ":\n\n    ")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    write(Path(__file__).resolve().parent / "generated")
