"""Blueprints broken at random, by text and by structure, and overrides with them. Only blueprint errors may come out.

    python -m tests.blueprint.fuzz --count 20000 --seed 1

prints how many were refused and accepted, the seconds they took, the slowest, and the peak memory.
"""

import argparse
import copy
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sedd_graph.blueprint.yaml import read_yaml
from sedd_graph.errors import SeddGraphError
from sedd_graph.graph.draw import to_json, to_mermaid, to_svg, to_tree
from sedd_graph.runs.check import check, lock_text

NUMBERS = ["274877906944", "68719476735", "1099511627775", "3000", "1" * 16_000 + "z", "0." + "1" * 16_000, "1" * 16_000 + "." + "2" * 300, "0", "-1", "1", "2", "3", "7", "4096", "4097", "99999999999", "1099511627776", "9" * 17, "9" * 30, "1e-3", "1e308", "1e309", ".5", "5.", "+1", "-0", "0x10", "0o7", "010", "1_000", "1:30", ".nan", "-.inf", "NaN", "1e", "--1", "٣", "½"]  # fmt: skip
TEXTS = ["null", "~", "true", "yes", "no", "''", '""', "[]", "{}", "[[]]", "{a: {}}", "!!x", "!!python/object:os.system x", "*a", "&a x", "<<", "=", "?", "-", "@", "`", "%", "'", '"', "|", ">", "# x", "\u2028", "é", "\U0001f600", '"\\ud83d"', '"\\U0001F600"', '"\\0"', "x" * 65, "y" * 300, "z" * 20_000, "a b", "a.b", "a.b.c", ".", "..", "${", "${}", "${params.dim}", "${params.dim}${params.dim}", "$${params.dim}", "${params.nothing}", "${oc.env:HOME}", "${params.${params.dim}}"]  # fmt: skip
SIZES = ["d", "4*d", "d//2", "d//3", "d-d", "d-2*d", "1//0", "0*d", "b", "l", "b*l", "batch", "length+1", "(((d)))", "d*d*d*d*d*d*d*d*d", "2**40", "d/2", "d%2", "q", "(d", "d)", "", "d d", "v+1", "heads*r", "*s", "int", "float"]  # fmt: skip
TYPES = ["float b l d", "int b l", "bool b l", "float", "float b", "float b l d d", "float b d l", "float *s", "float b l 2*d", "float b l q", "flaot b", "float b l 0", "float b l d-d", "int int", "b l d"]  # fmt: skip
OPS = ["add", "mean", "sub", "scale", "split", "concat", "permute", "rms_norm", "layer_norm", "attention", "feed_forward", "short_conv", "rotary", "token_embedding", "sigma_embedding", "x0_head", "score_head", "absorb", "uniform", "loglinear", "geometric", "nelbo", "masked_count", "score_entropy", "ancestral", "analytic", "euler", "transformers_backbone", "add.v1", "add.v2", "os.system", "no_such"]  # fmt: skip
PATHS = ["../../etc/passwd", "/etc/passwd", "blocks", ".", "", "blocks/dit.yaml", "blocks/../blocks/dit.yaml", "mutant.yaml", "loop.yaml", "sedd_graph:blocks/dit.yaml", "sedd_graph:../secret", "nul\\0", "é.yaml", "x" * 2000, "blocks/dit.yaml/x", "http://x/y.yaml"]  # fmt: skip
KEYS = ["in", "out", "with", "op", "block", "repeat", "save", "memory", "arithmetic", "invertible", "given", "level", "ports", "every", "inputs", "outputs", "nodes", "params", "blocks", "use", "axes", "description", "name", "process", "schedule", "objective", "sample", "data", "train", "store", "tokenizer", "heads", "sizes", "pattern", "x", "training", "plan", "nodez", "é", "a b", "1", "null", "x" * 101]  # fmt: skip


class Raw(str):
    """Text that goes into the file as it stands."""


Pairs = list[tuple[str, Any]]
"""A mapping as a list, so that a key may stand there twice."""


class Map:
    """A mapping whose keys may repeat."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs


def opened(data: Any) -> Any:
    """Plain data with every mapping as a :class:`Map`."""
    if isinstance(data, dict):
        return Map([(k, opened(v)) for k, v in data.items()])
    return [opened(v) for v in data] if isinstance(data, list) else data


def written(value: Any) -> str:
    """YAML in flow style."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Map):
        return "{" + ", ".join(f"{k}: {written(v)}" for k, v in value.pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


Place = tuple[Any, int]
"""A container and where in it."""


def places(value: Any) -> list[Place]:
    """Every place in a tree, from the top."""
    found: list[Place] = []
    inner = [v for _, v in value.pairs] if isinstance(value, Map) else value if isinstance(value, list) else []
    for index, child in enumerate(inner):
        found.append((value, index))
        found += places(child)
    return found


def get(place: Place) -> Any:
    container, index = place
    return container.pairs[index][1] if isinstance(container, Map) else container[index]


def put(place: Place, value: Any) -> None:
    container, index = place
    if isinstance(container, Map):
        container.pairs[index] = (container.pairs[index][0], value)
    else:
        container[index] = value


def scalar(rng: random.Random) -> Raw:
    return Raw(rng.choice(rng.choice([NUMBERS, TEXTS, SIZES, TYPES, OPS, PATHS])) or "''")


def mutate_tree(tree: Map, rng: random.Random) -> None:
    """One change of the structure."""
    every = places(tree)
    if not every:
        return
    at, other = rng.choice(every), rng.choice(every)
    container, index = at
    value = get(at)
    kind = rng.randrange(16)
    if kind <= 2:
        put(at, scalar(rng))
    elif kind == 3:
        put(at, copy.deepcopy(get(other)))  # a part in another's place
    elif kind == 4:
        one, two = copy.deepcopy((value, get(other)))  # swapped
        put(at, two)
        put(other, one)
    elif kind == 5 and isinstance(container, Map):
        del container.pairs[index]
    elif kind == 6 and isinstance(container, Map):
        container.pairs.append(
            (container.pairs[index][0], rng.choice([copy.deepcopy(value), scalar(rng)]))
        )  # twice the same key
    elif kind == 7 and isinstance(container, Map):
        container.pairs[index] = (rng.choice(KEYS), value)
    elif kind == 8:
        maps = [get(p) for p in every if isinstance(get(p), Map)] + [tree]
        rng.choice(maps).pairs.append((rng.choice(KEYS), rng.choice([scalar(rng), Raw("{}"), Raw("[]")])))
    elif kind == 9:
        for _ in range(rng.choice([1, 2, 3, 45])):  # deep
            value = [value] if rng.random() < 0.5 else Map([(rng.choice(KEYS[:30]), value)])
        put(at, value)
    elif kind == 10:
        names = [k for p in every if isinstance(p[0], Map) and (k := p[0].pairs[p[1]][0])]
        put(at, Raw(rng.choice(names) + rng.choice(["", "", ".out", ".x", ".0"])))  # some name of the file
    elif kind == 11:
        put(at, Raw(f"&a{rng.randrange(3)} {written(value)}" if rng.random() < 0.5 else f"*a{rng.randrange(3)}"))
    elif kind == 12:
        for p in every:
            holder, i = p
            if (
                isinstance(holder, Map)
                and holder.pairs[i][0] in ("op", "block", "repeat", "in", "out")
                and rng.random() < 0.1
            ):
                put(p, Raw({"op": rng.choice(OPS), "out": rng.choice(TYPES), "repeat": rng.choice(NUMBERS)}.get(holder.pairs[i][0], rng.choice(KEYS))))  # fmt: skip
    elif kind == 13:
        keys = rng.sample(KEYS, 3)
        tree.pairs.append(("use", Map([(k, Raw(rng.choice(PATHS) or "''")) for k in keys])))
    elif kind == 14 and isinstance(value, Map) and value.pairs:
        name, body = rng.choice(value.pairs)
        value.pairs += [(f"{name}_{i}", copy.deepcopy(body)) for i in range(rng.choice([1, 2, 30]))]
    elif isinstance(value, list):
        value *= rng.choice([0, 2, 3, 50])


def mutate_text(text: str, rng: random.Random) -> str:
    """One change of the characters, wherever they stand."""
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif kind == 1:
        del lines[at]
    elif kind == 2:
        lines[at] = " " * rng.randrange(4) + lines[at]
    elif kind == 3:
        parts = lines[at].split(" ")
        parts[rng.randrange(len(parts))] = scalar(rng)
        lines[at] = " ".join(parts)
    text = "\n".join(lines) or "a"
    if kind == 4:
        place = rng.randrange(len(text))
        text = text[:place] + chr(rng.randrange(1, 0x3000)) + text[place + rng.randrange(3) :]
    return text


def mutant(text: str, rng: random.Random) -> bytes:
    """One to four changes of one blueprint."""
    if rng.random() < 0.7:
        tree = opened(read_yaml(text.encode()).data)
        for _ in range(rng.randint(1, 3)):
            mutate_tree(tree, rng)
        text = "\n".join(f"{k}: {written(v)}" for k, v in tree.pairs) or "a"
        changes = rng.randrange(2)
    else:
        changes = rng.randint(1, 4)
    for _ in range(changes if rng.random() < 0.5 else 0):
        text = mutate_text(text, rng)
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        place = rng.randrange(len(raw))
        raw = raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :]
    return raw


def overrides(text: str, rng: random.Random) -> list[str]:
    """None in most cases; else one to three, of paths that are there or nearly so."""
    if rng.random() < 0.7:
        return []
    found: list[str] = []

    def visit(value: Any, path: str) -> None:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in inner:
            found.append(f"{path}{key}")
            visit(child, f"{path}{key}.")

    visit(read_yaml(text.encode()).data, "")
    odd = ["", ".", "params", "params.", "params.nothing", "train.steps.x", "nodes.é", "a" * 200, "x." * 60 + "y", "train." + "9" * 5000, "data.0", "\udcff"]  # fmt: skip
    chosen = []
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(found if rng.random() < 0.8 else odd)
        key += rng.choice(["", "", "", ".x", ".0"])
        chosen.append(key + rng.choice(["=", "=", "=", "==", ""]) + scalar(rng))
    return chosen


def run(
    sources: list[str], folder: Path, *, count: int, seed: int, progress: Callable[[str], None] = lambda text: None
) -> dict[str, float]:
    """Check ``count`` mutants, and draw and lock those that are accepted.

    Returns how many were refused and accepted, and the seconds of the slowest. Raises :class:`AssertionError` on
    anything but a :class:`SeddGraphError`, and on 5 s for one.
    """
    rng, outcome = random.Random(seed), {"refused": 0.0, "accepted": 0.0, "slowest": 0.0}
    path = folder / "mutant.yaml"
    (folder / "loop.yaml").write_text("blueprint: 1\nuse: {loop: loop.yaml, again: mutant.yaml}\n")
    for index in range(count):
        source = rng.choice(sources)
        raw, given = mutant(source, rng), overrides(source, rng)
        path.write_bytes(raw)
        began = time.process_time()
        try:
            report = check(path, given)
            drawn = [
                str(report),
                lock_text(report),
                *(draw(report.graph) for draw in (to_tree, to_json, to_mermaid, to_svg)),
            ]
            assert all(drawn)
            outcome["accepted"] += 1
        except SeddGraphError as error:
            assert str(error)
            outcome["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{raw!r}\n{given!r}") from error
        seconds = time.process_time() - began
        outcome["slowest"] = max(outcome["slowest"], seconds)
        assert seconds < 5, (seconds, raw, given)
        if index % 1000 == 999:
            progress(f"{index + 1} {outcome}")
    return outcome


def main() -> None:
    from tests.blueprint.test_fuzz import sources

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = sources(Path(folder))
        outcome = run(found, Path(folder), count=arguments.count, seed=arguments.seed, progress=print)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{arguments.count} mutants, seed {arguments.seed}: {outcome}, {time.monotonic() - began:.0f} s, peak {peak:.0f} MiB"
    )


if __name__ == "__main__":
    main()
