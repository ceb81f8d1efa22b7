"""Fill in expressions of Python functions that the model has not seen, with and without a regular expression, and parse the result.

    python holes.py RUN [--count 40] [--corpus FOLDER]

A hole is what a function of the held-out part of the standard library returns: a name, an attribute or a call. The model fills it
in with as many tokens. ``ast.parse`` of the whole function is the judge.
"""

import argparse
import ast
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from sedd_graph.engine.samples import SampleRequest, TextWithHoles
from sedd_graph.runs.open import Run, open_run
from sedd_graph.runs.prompts import hole_pattern
from sedd_graph.runs.sample import read_prompt

NAME = r"[a-z_][a-z0-9_]*"
EXPRESSION = rf"{NAME}(\.{NAME})*(\(({NAME}(, {NAME})*)?\))? *"
"""A name, an attribute or a call of names. Blanks at the end let a shorter one fill the tokens of the hole."""


def returned(source: str) -> Iterator[tuple[str, str]]:
    """Yield the functions of a module up to what they return, and that expression, where it is one of the kind above."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in old modules
        tree = ast.parse(source)
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not isinstance(last := node.body[-1], ast.Return):
            continue
        value = last.value
        if not isinstance(value, ast.Name | ast.Attribute | ast.Call) or value.lineno != value.end_lineno:
            continue
        text = textwrap.dedent(
            "\n".join([*lines[node.lineno - 1 : value.lineno - 1], lines[value.lineno - 1][: value.col_offset]])
        )
        yield text, lines[value.lineno - 1][value.col_offset : value.end_col_offset]


def heldout(folder: Path, share: float) -> list[Path]:
    """Return the modules that lie whole in the last ``share`` of the corpus."""
    files = sorted(folder.glob("*.py"))
    sizes = [len(file.read_text(encoding="utf-8")) for file in files]
    cut = (1 - share) * sum(sizes)
    return [file for i, file in enumerate(files) if sum(sizes[:i]) >= cut]


def fill(run: Run, text: str, expression: str, *, constrained: bool, seed: int) -> str:
    """Return the function with its hole filled in."""
    tokens = max(2, len(run.text_tokenizer().encode(expression)))
    holes = TextWithHoles(text=f"{text}[[{tokens}]]\n")
    prompt = read_prompt(run, holes, observed="clamp")
    pattern = {"matching": hole_pattern(holes, [EXPRESSION])} if constrained else {}
    conditions = run.engine.process.conditions(pattern)
    request = SampleRequest(batch=1, length=prompt.length, seed=seed, prompt=prompt.tokens, conditions=conditions)
    return run.decode(run.engine.generate(request).rows)[0]


def parses(text: str) -> bool:
    """Return True if Python can parse a text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def tasks(folder: Path, share: float, most: int) -> list[tuple[str, str]]:
    """Return functions with at most ``most`` characters before the hole, of all held-out modules in turn."""
    each = [[t for t in returned(f.read_text(encoding="utf-8")) if len(t[0]) <= most] for f in heldout(folder, share)]
    turns = [task for i in range(max(map(len, each), default=0)) for found in each for task in found[i : i + 1]]
    return [(text, value) for text, value in turns if "[[" not in text and parses(text + value)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a trained run of python-tiny")
    parser.add_argument("--count", type=int, default=40, help="functions to fill in (default: 40)")
    parser.add_argument("--corpus", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of the modules")
    arguments = parser.parse_args()
    run = open_run(arguments.run, device="cpu", compile="off")
    share = run.report.data.holdout if run.report.data is not None else 0.1  # type: ignore[union-attr]  # text, not points
    chosen = tasks(arguments.corpus, share, 300)[: arguments.count]
    for constrained in (False, True):
        filled = [fill(run, *task, constrained=constrained, seed=i) for i, task in enumerate(chosen)]
        good = sum(map(parses, filled))
        print(f"{'with' if constrained else 'without'} the expression: {good} of {len(filled)} functions parse")
        for (text, value), done in list(zip(chosen, filled, strict=True))[:5]:
            print(f"    was {value!r}, is {done.removeprefix(text).rstrip()!r}")


if __name__ == "__main__":
    main()
