"""``sedd-graph tokenize``: make shards of tokens from text, for corpora that do not fit into memory."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedd_graph.cli.options import Verbs, add_outside, add_verb, integer
from sedd_graph.cli.terminal import say
from sedd_graph.errors import UserError, suggest
from sedd_graph.inputs.confine import allow_outside

if TYPE_CHECKING:
    from sedd_graph.data.config import DataConfig
    from sedd_graph.runs.tokenize import TokenizeRequest

__all__ = ["declare", "run"]

_SUFFIXES = {".txt": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_BLUEPRINTS = (".yaml", ".yml")


def declare(verbs: Verbs) -> None:
    """Add the ``tokenize`` subcommand and its arguments to ``verbs``, the subparsers of the command line."""
    parser = add_verb(
        verbs, "tokenize", run, "make shards of tokens from text, for corpora that do not fit into memory"
    )
    parser.add_argument(
        "corpus",
        nargs="+",
        metavar="CORPUS",
        help="files or glob patterns of one kind (.txt, .jsonl, .parquet; the first two also .gz or .zst), or one "
        "blueprint, whose data.corpus is tokenised; with --verify, folders of shards",
    )
    parser.add_argument("-o", "--output", metavar="SHARDS", help="folder for the shards, new or left unfinished")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|FILE",
        help="a tokenizer.json, a folder that holds one (a run, other shards), a blueprint for its data.tokenizer, or a "
        "component such as bytes or bpe, which is fitted to the text (default: that of the blueprint CORPUS)",
    )
    parser.add_argument("--tokens", type=integer(3, 2**20), help="vocabulary size of a tokenizer that is fitted")
    parser.add_argument("--field", help="field of .jsonl and .parquet with the text (default: text)")
    parser.add_argument("--lines", action="store_true", help="make a document of each line that has text")
    parser.add_argument(
        "--heldout", action="store_true", help="tokenise data.heldout of the blueprint, not data.corpus"
    )
    parser.add_argument(
        "--processes", type=integer(1, 1024), help="processes that tokenise (default: one for each processor)"
    )
    parser.add_argument("--shard-tokens", type=integer(1, 2**36), help="tokens of a shard (default: 134,217,728)")
    parser.add_argument("--verify", action="store_true", help="compare shards with the hashes in their index instead")
    add_outside(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the ``tokenize`` subcommand with the parsed ``arguments`` and return its exit code."""
    from sedd_graph.runs.tokenize import tokenize_corpus, verify_shards

    if arguments.verify:
        if arguments.output is not None:
            raise UserError("--verify reads shards: it takes no -o")
        for folder in arguments.corpus:
            verify_shards(Path(folder), say=say)
        return 0
    if arguments.output is None:
        raise UserError("name the folder for the shards: -o SHARDS")
    folder = Path(arguments.output)
    request, outside = _request(arguments)
    with allow_outside(outside or arguments.allow_outside):
        tokenize_corpus(request, folder, say=say)
    name = folder.name
    say(
        f"next        data: {{corpus: {{op: tokens, files: [{name}]}}, tokenizer: {{op: file, path: {name}/tokenizer.json}}}}"
    )
    return 0


def _request(arguments: argparse.Namespace) -> tuple[TokenizeRequest, bool]:
    """Return the request, and whether the user named the files themselves, wherever they are."""
    from sedd_graph.runs.tokenize import SHARD_TOKENS, TokenizeRequest

    blueprints = [name for name in arguments.corpus if Path(name).suffix in _BLUEPRINTS]
    if blueprints and len(arguments.corpus) > 1:
        raise UserError(f"{blueprints[0]} is a blueprint: name it alone, or files of text alone")
    named = None
    if blueprints:
        if arguments.field:
            raise UserError("--field is for files: a blueprint names the field in data.corpus")
        named = _data_of(Path(blueprints[0]))
        root = _folder_of(blueprints[0])
        corpus = named.heldout if arguments.heldout else named.corpus
        if corpus is None:
            raise UserError(f"{blueprints[0]} has no data.heldout")
    else:
        if arguments.heldout:
            raise UserError("--heldout is for a blueprint: files of text are tokenised as they are named")
        root, corpus = Path.cwd(), _corpus_of(arguments.corpus, arguments.field)
    config, path, config_root = named, None, root
    if arguments.tokenizer is not None:
        config, path, config_root = _tokenizer_of(arguments.tokenizer, arguments.tokens)
    elif arguments.tokens:
        raise UserError("--tokens is the size of a tokenizer that --tokenizer names, such as bpe")
    if config is None and path is None:
        raise UserError("name a tokenizer: --tokenizer bpe, bytes, characters, or a tokenizer.json")
    request = TokenizeRequest(
        corpus=corpus,
        root=root,
        config=config,
        config_root=config_root,
        tokenizer=path,
        unit="line" if arguments.lines else "document",
        processes=arguments.processes or _processors(),
        shard_tokens=arguments.shard_tokens or SHARD_TOKENS,
    )
    return request, not blueprints


def _processors() -> int:
    """Return the number of processors that this process may use."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return found or 1


def _data_of(path: Path) -> DataConfig:
    """Return the ``data`` section of a blueprint."""
    from sedd_graph.data.config import DataConfig
    from sedd_graph.runs.check import check

    data = check(path, []).data
    if not isinstance(data, DataConfig):
        raise UserError(f"{path} is a blueprint of points, not of text")
    return data


def _corpus_of(names: list[str], field: str | None) -> Any:
    """Return the corpus of files that the user names, whose suffix says what they are."""
    from sedd_graph.data.config import DataConfig

    kinds = set()
    for name in names:
        suffix = Path(Path(name).stem).suffix if Path(name).suffix in (".gz", ".zst") else Path(name).suffix
        if suffix not in _SUFFIXES:
            raise UserError(
                f"{name}: its suffix does not say what it is{suggest(suffix, _SUFFIXES)}; text is .txt, .jsonl or "
                ".parquet, the first two also .gz or .zst, or name a blueprint"
            )
        kinds.add(_SUFFIXES[suffix])
    if len(kinds) > 1:
        raise UserError(
            f"the files are of different kinds ({', '.join(sorted(kinds))}): tokenise each to its own folder"
        )
    (kind,) = kinds
    if field is not None and kind == "text":
        raise UserError("--field is for .jsonl and .parquet: a text file is a document as it is")
    keys = {"op": kind, "files": names} | ({} if field is None else {"field": field})
    return DataConfig.model_validate({"corpus": keys}).corpus


def _folder_of(blueprint: str) -> Path:
    """Return the folder to which file names in a blueprint are relative."""
    return Path(os.path.realpath(blueprint)).parent


def _tokenizer_of(name: str, size: int | None) -> tuple[DataConfig | None, Path | None, Path]:
    """Return what ``--tokenizer`` names: the ``data`` section with the tokenizer, or its file; and the section's folder."""
    import pydantic

    from sedd_graph.data.config import DataConfig

    path = Path(name)
    if path.suffix in _BLUEPRINTS and size is None:
        return _data_of(path), None, _folder_of(name)
    if path.exists():
        if size is not None:
            raise UserError(f"{name} has its size: --tokens is for a tokenizer that is fitted, such as bpe")
        return None, Path(os.path.realpath(path)), Path.cwd()
    try:
        keys = {"op": name} | ({} if size is None else {"size": size})
        return DataConfig.model_validate({"tokenizer": keys}), None, Path.cwd()
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"--tokenizer {name}: no such file, and no such component: {reason}") from None
