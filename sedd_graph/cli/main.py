"""The command line: ``sedd-graph VERB``. Torch and all else are imported only when a verb needs them.

Exit codes: 0 done, 1 the environment, 2 the user, 3 numbers that diverged, 130 and 143 for a clean end after SIGINT and
SIGTERM.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from sedd_graph.diffusion.conditions.conditions import Conditions
    from sedd_graph.runs.open import Run

__all__ = ["main"]

_SIGNALS = {"SIGINT": 130, "SIGTERM": 143}


LARGEST = 2**20
"""Tokens per row, as in ``data.length``."""


def _say(text: str) -> None:
    print(text, flush=True)


def _device(arguments: argparse.Namespace) -> Any:
    from sedd_graph.engine.hardware import pick_device

    return pick_device(arguments.device)


# -- verbs --------------------------------------------------------------------------------------------------------


def _build(arguments: argparse.Namespace) -> int:
    if arguments.check:
        # Nothing is freed before this process ends; walking over torch's objects was a tenth of a second.
        gc.disable()
        from sedd_graph.runs.check import check

        _say(str(check(arguments.blueprint, arguments.overrides)))
        return 0
    from sedd_graph.runs.build import build_run

    run = build_run(
        Path(arguments.blueprint),
        arguments.overrides,
        runs=Path(arguments.runs),
        device=_device(arguments),
        compile=arguments.compile,
        say=_say,
    )
    _write_report(run)
    _say(f"\nrun folder  {run}\nnext        sedd-graph train {run}")
    if arguments.path_to:
        from sedd_graph.store.files import write_text

        write_text(Path(arguments.path_to), str(run))
    return 0


def _write_report(run: Path) -> None:
    from sedd_graph.report.html import write_report

    write_report(run)


def _train(arguments: argparse.Namespace) -> int:
    from sedd_graph.runs.build import build_run
    from sedd_graph.runs.open import train_run

    path = Path(arguments.run)
    if path.is_file():
        if arguments.resume:
            from sedd_graph.errors import UserError

            raise UserError(f"{path} is a blueprint: --resume goes on with a run folder")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from sedd_graph.errors import UserError

            raise UserError("under torchrun, give train a run folder: make one with `sedd-graph build` first")
        path = build_run(
            path, arguments.overrides, runs=Path(arguments.runs), device=_device(arguments), compile="off", say=_say
        )
        _say(f"run folder  {path}")
    elif arguments.overrides:
        from sedd_graph.errors import UserError

        raise UserError("a run folder is locked: overrides go to `sedd-graph build`")
    result, _ = train_run(path, resume=arguments.resume, device=_device(arguments), say=_say)
    if int(os.environ.get("RANK", "0")) == 0:
        _write_report(path)
        if result.reason in _SIGNALS:
            _say(f"checkpoint written; go on with: sedd-graph train {path} --resume")
    return _SIGNALS.get(result.reason, 0)


def _open(arguments: argparse.Namespace) -> Run:
    from sedd_graph.runs.open import open_run

    guide = getattr(arguments, "classifier", None)
    overrides = [] if guide is None else [f"sample.classifier={guide}"]
    run = open_run(
        Path(arguments.run), overrides=overrides, device=_device(arguments), compile="off", weights=arguments.weights
    )
    if "compile" in arguments:
        run.engine.compile(arguments.compile, everywhere=True)
    return run


def _conditions(run: Run, arguments: argparse.Namespace) -> Conditions | None:
    """The blueprint's conditions, with those of the command line; None for a model that chooses lengths, which knows none."""
    import pydantic

    from sedd_graph.diffusion.conditions.conditions import Conditions
    from sedd_graph.errors import UserError

    if run.plan().edits:
        if (
            arguments.forbid
            or arguments.allow
            or any(getattr(arguments, name, None) is not None for name in ("matching", "guidance", "observed"))
        ):
            raise UserError(
                "this model chooses lengths itself: --forbid, --allow, --matching, --guidance and --observed are for models of rows"
            )
        return None
    config = run.plan().sampler.config
    held = {name: getattr(config, name) for name in Conditions.model_fields}
    for name in ("matching", "guidance", "observed"):
        value = getattr(arguments, name, None)
        held[name] = held[name] if value is None else value
    held["forbid"] = [*held["forbid"], *arguments.forbid]
    held["allow"] = {**held["allow"], **dict(arguments.allow)}
    try:
        return Conditions(**held)
    except pydantic.ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"]))
        raise UserError(f"--{where}: {found['msg'].removeprefix('Value error, ')}") from None


def _sample(arguments: argparse.Namespace) -> int:
    from sedd_graph.runs.open import sample_run

    run = _open(arguments)
    if run.report.flow is not None:
        return _sample_points(run, arguments)
    length = arguments.length or run.report.data.length
    texts, where = sample_run(
        run,
        batch=arguments.batch,
        length=length,
        steps=arguments.steps,
        seed=arguments.seed,
        given=_conditions(run, arguments),
        trajectory=arguments.trajectory,
    )
    return _shown(run, texts, where)


def _sample_points(run: Run, arguments: argparse.Namespace) -> int:
    from sedd_graph.errors import UserError
    from sedd_graph.runs.open import sample_points

    if arguments.steps or arguments.length or arguments.trajectory:
        raise UserError("a flow is sampled by its inverse: --length, --steps and --trajectory are for language models")
    if arguments.forbid or arguments.allow or arguments.matching is not None:
        raise UserError("a flow draws no text: --forbid, --allow and --matching are for language models")
    rows, where = sample_points(run, batch=arguments.batch, seed=arguments.seed)
    return _shown(run, [" ".join(f"{value:.4f}" for value in row.flatten().tolist()) for row in rows[:16]], where)


def _shown(run: Run, texts: list[str], where: Path) -> int:
    for number, text in enumerate(texts):
        _say(f"--- {number}\n{text}")
    _say(f"---\nweights {run.weights}; kept in {where}")
    _write_report(run.path)
    return 0


def _infill(arguments: argparse.Namespace) -> int:
    from sedd_graph.runs.infill import infilling, read_prompt
    from sedd_graph.runs.open import sample_run

    run = _open(arguments)
    prompt = read_prompt(
        run,
        text=arguments.text,
        prefix=arguments.prefix,
        suffix=arguments.suffix,
        length=arguments.length,
    )
    given = _conditions(run, arguments)
    law = infilling(run, given.observed if given else "clamp")
    if not law.holds:
        print(f"warning: {law.how}", file=sys.stderr)
    texts, where = sample_run(
        run,
        batch=arguments.batch,
        # a model that chooses lengths itself is given room; for others the prompt has all positions
        length=(arguments.length or run.report.data.length) if run.plan().edits else prompt.shape[1],
        steps=arguments.steps,
        seed=arguments.seed,
        prompt=prompt,
        given=given,
        trajectory=arguments.trajectory,
        name="infilled.zarr",
        notes={"infilling": law.how},
    )
    return _shown(run, texts, where)


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.samples is not None or arguments.judge is not None or arguments.mauve:
        return _eval_samples(arguments)
    from sedd_graph.runs.open import evaluate_run

    path = Path(arguments.run)
    evaluate_run(
        path,
        device=_device(arguments),
        batches=arguments.batches,
        draws=arguments.draws or 1,
        weights=arguments.weights,
        say=_say,
    )
    _write_report(path)
    return 0


def _eval_samples(arguments: argparse.Namespace) -> int:
    from sedd_graph.errors import UserError
    from sedd_graph.runs.judge import judge_run

    if arguments.batches or arguments.draws or arguments.weights != "newest":
        raise UserError("--batches, --draws and --weights are for the bound: without --samples, --judge and --mauve")
    path = Path(arguments.run)
    judge_run(
        path,
        samples=Path(arguments.samples) if arguments.samples else None,
        judge=Path(arguments.judge) if arguments.judge else None,
        with_mauve=arguments.mauve,
        device=_device(arguments),
        say=_say,
    )
    _write_report(path)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from sedd_graph.graph import draw
    from sedd_graph.runs.check import LOCK, check

    path = Path(arguments.blueprint)
    path = path / LOCK if path.is_dir() else path
    if arguments.inverse:
        return _show_inverse(path, arguments)
    report = check(path, arguments.overrides)
    if arguments.format == "lock":
        from sedd_graph.runs.check import lock_text

        _say(lock_text(report).rstrip("\n"))
    else:
        made = {"tree": draw.to_tree, "mermaid": draw.to_mermaid, "svg": draw.to_svg, "json": draw.to_json}
        _say(made[arguments.format](report.graph).rstrip("\n"))
    return 0


def _show_inverse(path: Path, arguments: argparse.Namespace) -> int:
    """Per claimed block, how it is undone or why it cannot be; or a drawing of both directions."""
    from sedd_graph.errors import UserError
    from sedd_graph.graph import draw
    from sedd_graph.inverse.format import arrows, explain
    from sedd_graph.runs.check import undo

    graph, derived = undo(path, arguments.overrides)
    if not derived:
        raise UserError(f"{path}: no block claims to be invertible; say 'invertible: true' in one")
    if arguments.format in ("mermaid", "svg"):
        made = {"mermaid": draw.to_mermaid, "svg": draw.to_svg}[arguments.format]
        _say(made(graph, {one.region: arrows(one.found) for one in derived}).rstrip("\n"))
    elif arguments.format == "tree":
        _say("\n\n".join(explain(one.found) for one in derived))
    else:
        raise UserError("--inverse goes with --format tree, mermaid or svg")
    refused = [one for one in derived if one.problem is not None]
    return UserError.exit_code if refused else 0


def _components(arguments: argparse.Namespace) -> int:
    from sedd_graph.component.describe import describe, list_components

    if arguments.matrix:
        from sedd_graph.component.registry import discover
        from sedd_graph.errors import UserError
        from sedd_graph.runs.matrix import cells, matrix

        if arguments.name:
            raise UserError("--matrix is of all components: leave the name out")
        _say(matrix(cells(discover())).rstrip("\n"))
        return 0
    _say(describe(arguments.name) if arguments.name else list_components())
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from sedd_graph.runs.check import schema_text

    text = schema_text()
    if arguments.output:
        from sedd_graph.store.files import write_text

        write_text(Path(arguments.output), text)
        _say(f"written to {arguments.output}")
    else:
        _say(text.rstrip("\n"))
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from sedd_graph.runs.import_weights import import_run

    run = import_run(
        arguments.kind,
        Path(arguments.weights),
        out=Path(arguments.output) if arguments.output else None,
        runs=Path(arguments.runs),
        kernel=arguments.kernel,
        say=_say,
    )
    _write_report(run)
    _say(f"run folder  {run}\nnext        sedd-graph sample {run}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from sedd_graph.errors import UserError
    from sedd_graph.runs.check import LOCK

    arguments.weights = "newest"
    out = Path(arguments.output)
    if (out / LOCK).exists() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} exists already; choose another folder")
    run = _open(arguments)
    run.engine.save(out)
    _say(f"weights ({run.weights}), lock file and tokenizer written to {out}; sedd_graph.build({str(out)!r}) opens it")
    return 0


# -- arguments ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, rather than behind all that is possible."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` tells more\n")


def _whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument that is an integer from ``low`` to ``high``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:,} to {high:,}, not {value:,}")
        return value

    return read


def _at_position(text: str) -> tuple[int, str]:
    """The type of an argument POSITION=REGEX."""
    position, found, pattern = text.partition("=")
    try:
        if found:
            return int(position), pattern
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not POSITION=REGEX, such as 0=[A-Z]")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sedd-graph",
        description="Discrete-diffusion language models: declare them in YAML, prove them, run them.",
        epilog="Exit codes: 0 done, 1 environment, 2 your input, 3 diverged numbers.",
    )
    from sedd_graph import __version__

    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text)
        made.set_defaults(function=function)
        made.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        return made

    def overridable(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "overrides", nargs="*", metavar="key=value", help="changes to the blueprint, such as train.steps=100"
        )

    def device(made: argparse.ArgumentParser) -> None:
        made.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps; the best one present by default")

    def runs(made: argparse.ArgumentParser) -> None:
        made.add_argument("--runs", default="runs", metavar="DIR", help="where run folders are made (default: runs)")

    def sampling(made: argparse.ArgumentParser) -> None:
        made.add_argument("run", help="a run folder")
        made.add_argument("--batch", type=_whole(1, 65_536), default=4, help="rows to draw (default: 4)")
        made.add_argument(
            "--length",
            type=_whole(1, LARGEST),
            help="tokens per row, or at most as many where lengths change (default: data.length)",
        )
        made.add_argument("--steps", type=_whole(1, 1_000_000), help="sampler steps (default: the blueprint's)")
        made.add_argument(
            "--seed", type=_whole(0, 2**63 - 1), default=0, help="the same seed draws the same rows (default: 0)"
        )
        made.add_argument("--trajectory", action="store_true", help="keep the rows after every step too")
        made.add_argument("--matching", metavar="REGEX", help="every row's text as a whole matches it")
        made.add_argument(
            "--forbid", metavar="TEXT", action="append", default=[], help="no token that holds it (may be repeated)"
        )
        made.add_argument(
            "--allow",
            metavar="POSITION=REGEX",
            type=_at_position,
            action="append",
            default=[],
            help="the token at a position (negative: from the end) matches it (may be repeated)",
        )
        made.add_argument(
            "--classifier",
            metavar="OP",
            help="draw towards a label, such as '{op: token_counts, file: counts.npy, label: 1, strength: 2}'",
        )
        made.add_argument(
            "--compile",
            choices=("off", "block"),
            default="off",
            help="block: compile each repeated block first, which pays for large batches (default: off)",
        )
        weights(made)
        device(made)

    def weights(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--weights",
            choices=("newest", "model", "fresh"),
            default="newest",
            help="newest: averaged where there are any; model: the trained ones themselves; fresh: untrained",
        )

    made = verb("build", _build, "check a blueprint, prove its process, compile, and write a run folder")
    made.add_argument("blueprint")
    overridable(made)
    made.add_argument(
        "--check", action="store_true", help="only check: typed graph and parameters, nothing allocated or written"
    )
    made.add_argument(
        "--compile", choices=("auto", "block", "whole", "off"), default=None, help="instead of train.compile"
    )
    made.add_argument("--path-to", metavar="FILE", default=None, help="write the run folder's path into FILE")
    runs(made)
    device(made)

    made = verb("train", _train, "train a run folder (or build a blueprint and train it)")
    made.add_argument("run", metavar="RUN|BLUEPRINT")
    overridable(made)
    made.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    runs(made)
    device(made)

    sampling(verb("sample", _sample, "draw text (or a flow's points) from a run folder's newest weights"))
    made = verb("infill", _infill, "fill in the free parts of a text")
    sampling(made)
    made.add_argument(
        "--text", help="text in which [[N]] stands for N free tokens ([[]] for any number, where lengths change)"
    )
    made.add_argument("--prefix", help="text that rows begin with")
    made.add_argument("--suffix", help="text that rows end with")
    made.add_argument(
        "--guidance", type=float, help="how much the given text counts: 1 as the model has it, 2 or 3 more"
    )
    made.add_argument(
        "--observed",
        choices=("clamp", "renoise"),
        help="where the kernel moves seen tokens: the given text as it is, or noised anew each step",
    )

    made = verb("eval", _eval, "bound the held-out text of a run folder, or judge its samples")
    made.add_argument("run")
    made.add_argument("--batches", type=_whole(1, 10**9), help="how many batches (default: all)")
    made.add_argument("--draws", type=_whole(1, 4096), help="noise draws per sequence (default: 1)")
    made.add_argument(
        "--samples",
        nargs="?",
        const="",
        metavar="ZARR",
        help="judge samples instead, the newest or those named: entropy and repetition, beside held-out text",
    )
    made.add_argument(
        "--judge", metavar="FOLDER", help="a local causal language model (or .gguf file) for generative perplexity"
    )
    made.add_argument("--mauve", action="store_true", help="MAUVE too, by the judge's hidden states (extra 'mauve')")
    weights(made)
    device(made)

    made = verb("show", _show, "print a blueprint's or run folder's graph")
    made.add_argument("blueprint", metavar="BLUEPRINT|RUN")
    overridable(made)
    made.add_argument("--format", choices=("tree", "mermaid", "svg", "json", "lock"), default="tree")
    made.add_argument(
        "--inverse",
        action="store_true",
        help="how the blocks that claim to be invertible are undone, or why they cannot be",
    )

    made = verb("components", _components, "list installed components, or describe one")
    made.add_argument("name", nargs="?", help="such as attention or attention.v1")
    made.add_argument(
        "--matrix", action="store_true", help="prove every kernel with every schedule, objective and sampler (minutes)"
    )

    made = verb("schema", _schema, "print the JSON Schema of blueprints, for editors")
    made.add_argument("-o", "--output", default=None, metavar="FILE")

    made = verb("import", _import, "turn released SEDD or MDLM weights into a run folder")
    made.add_argument("kind", choices=("sedd", "mdlm"))
    made.add_argument("weights", help="a safetensors file, a local hub folder, or a .pth")
    made.add_argument("-o", "--output", default=None, metavar="DIR", help="where to write (default: a new run folder)")
    made.add_argument("--kernel", choices=("absorb", "uniform"), default=None, help="where the weights do not say")
    runs(made)

    made = verb("export", _export, "write a run folder's newest weights, lock file and tokenizer to a folder")
    made.add_argument("run")
    made.add_argument("-o", "--output", required=True, metavar="DIR")
    device(made)
    return parser


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere; argparse takes those that follow an option for unknown arguments."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and leave with its exit code."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # a sentence, without a line of code
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Errors are sentences on standard error, never tracebacks without ``--debug``."""
    arguments = _parsed(argv)
    from sedd_graph.errors import SeddGraphError

    try:
        code: int = arguments.function(arguments)
        return code
    except SeddGraphError as error:
        if arguments.debug:
            raise
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as programs that a pipe's end has killed
    except Exception as error:
        if arguments.debug:
            raise
        if _out_of_memory(error):
            print(
                "out of memory: take fewer or shorter rows (--batch, --length; train.batch, train.accumulate, data.length), "
                "or a smaller model",
                file=sys.stderr,
            )
            return 1
        # what is left is a fault of ours or of a component; say so in one line
        text = str(error).strip().split("\n")[0]
        print(
            f"internal error: {type(error).__name__}: {text} (run again with --debug for the traceback)",
            file=sys.stderr,
        )
        return 1


def _out_of_memory(error: Exception) -> bool:
    """torch says so by a class of its own on a GPU and in words on a CPU."""
    said = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return said or isinstance(error, MemoryError)
