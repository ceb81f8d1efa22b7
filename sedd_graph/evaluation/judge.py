"""Likelihood of texts under a judge: a causal language model of the ``transformers`` library (extra ``hub``).

The judge is loaded from local files in safetensors or GGUF format. Nothing is downloaded, and code that comes with the
weights is not run.

Axes: w windows, l length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedd_graph.component.progress import progress
from sedd_graph.errors import MissingExtraError, SeddGraphError, UserError
from sedd_graph.evaluation.record import JudgeFacts

__all__ = ["Ids", "Judge", "Reading", "open_judge"]

PURPOSE = "a judge of samples"
TOKENS = 2048
"""Maximum number of tokens per forward pass. Their float32 logits take 400 MB with a vocabulary of 50,000 tokens."""

Ids = npt.NDArray[np.int64]
"""One-dimensional array of token ids, int64 [l], or a batch of them, int64 [row, position]."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """Likelihood of texts under a judge.

    Attributes:
        nats: -log p of each text, nats, summed over its counted tokens; float64 [texts].
        counted: Number of counted tokens of each text, float64 [texts]. Separators, the start token and a first token
            without context are not counted.
        windows: Number of windows (segments that fit into the judge's context) of each text, int64 [texts].
        tokens: For each text its token ids under the judge's tokenizer, without start tokens and separators, int64
            [tokens].
        features: For each text the judge's last hidden state at the last token of the first window, float32
            [texts, d], d being the size of a hidden state; None unless :meth:`Judge.read` was called with
            ``features=True``.
    """

    nats: npt.NDArray[np.float64]
    counted: npt.NDArray[np.float64]
    windows: Ids
    tokens: list[Ids]
    features: npt.NDArray[np.float32] | None


@dataclasses.dataclass(frozen=True)
class _Window:
    """Token ids [l] of the text with index ``text``; ``counted`` bool [l] is True where -log p is added up."""

    text: int
    ids: Ids
    counted: npt.NDArray[np.bool_]


class Judge:
    """Causal language model that computes the likelihood of texts.

    A text longer than the model's context is split into windows that are evaluated independently. Each window begins
    with the start token, if the tokenizer has one; otherwise its first token is context only, and its likelihood is not
    counted.

    Args:
        model: Causal language model of ``transformers``. It is moved to ``device`` and set to evaluation mode.
        tokenizer: Tokenizer of the model.
        name: Name of the judge in records and error messages.
        sha256: SHA-256 of the weight files, hexadecimal.
        device: Device that the model runs on.

    Attributes:
        context: Maximum number of tokens per window; None if the model sets no limit.
        start: Id of the token that the tokenizer puts first in a text; None if it puts none.
        end: Id of the token that separates documents, which is not counted; None if there is none.

    Raises:
        UserError: The model is not causal.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, sha256: str, device: torch.device) -> None:
        self.model, self.tokenizer = model.to(device).eval(), tokenizer
        self.name, self.sha256, self.device = name, sha256, device
        config = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        opening = tokenizer("a").input_ids[:1]
        first = tokenizer.bos_token_id
        self.start: int | None = first if first is not None and opening == [first] else None
        self.end: int | None = tokenizer.eos_token_id
        self._require_causal()

    def facts(self) -> JudgeFacts:
        """Return the name, checksum, number of parameters and context length, which identify the judge in a record."""
        return JudgeFacts(
            name=self.name,
            sha256=self.sha256,
            parameters=sum(p.numel() for p in self.model.parameters()),
            dtype="float32",
            context=self.context,
            start=None if self.start is None else self.tokenizer.convert_ids_to_tokens(self.start),
        )

    @torch.no_grad()
    def _require_causal(self) -> None:
        """Raise :class:`UserError` if a later token changes the logits of earlier positions."""
        rows = torch.zeros(2, 4, dtype=torch.int64, device=self.device)
        rows[1, -1] = 1
        seen = self.model(rows, use_cache=False).logits[:, :-1].float()
        if not torch.allclose(seen[0], seen[1], atol=1e-3 * float(seen.abs().max())):
            raise UserError(f"judge {self.name} attends to later tokens: a causal language model is needed")

    def _windows(self, number: int, documents: Sequence[str]) -> Iterator[_Window]:
        """Yield the windows of the text with index ``number``: its documents, with separators between them."""
        ids: list[int] = []
        real: list[bool] = []
        for place, document in enumerate(documents):
            if place and self.end is not None:
                ids.append(self.end)
                real.append(False)
            found = self.tokenizer(document, add_special_tokens=False).input_ids
            ids += found
            real += [True] * len(found)
        opening = [] if self.start is None else [self.start]
        width = max(2, self.context or len(ids) + 1) - len(opening)
        for at in range(0, len(ids), width):
            counted = np.array([False] * len(opening) + real[at : at + width])
            counted[0] = False
            yield _Window(number, np.array(opening + ids[at : at + width], dtype=np.int64), counted)

    @torch.no_grad()
    def read(self, texts: Sequence[Sequence[str]], *, features: bool = False) -> Reading:
        """Compute the likelihood of texts. The model runs in float32; log-probabilities are summed in float64.

        Args:
            texts: The texts. Each one is a list of documents, which are joined by the separator token.
            features: True to also return a hidden state of each text (:attr:`Reading.features`), as MAUVE requires.

        Returns:
            -log p and the number of counted tokens of each text, with its tokens and, on request, its features.
        """
        windows = [w for number, documents in enumerate(texts) for w in self._windows(number, documents)]
        nats, counted = np.zeros(len(texts)), np.zeros(len(texts))
        states: npt.NDArray[np.float32] | None = None
        first = {w.text: w for w in reversed(windows)}
        with progress("judging", total=len(windows), unit="window") as advance:
            for batch in _batches(sorted(windows, key=lambda w: -len(w.ids))):
                ids, seen, counts = _padded(batch, self.device)
                out = self.model(ids, attention_mask=seen.long(), use_cache=False, output_hidden_states=features)
                where = counts[:, 1:]
                found = torch.nn.functional.cross_entropy(
                    out.logits[:, :-1][where].float(), ids[:, 1:][where], reduction="none"
                )
                each = torch.zeros(len(batch), dtype=torch.float64, device=self.device)
                each.index_add_(0, where.nonzero()[:, 0], found.double())
                places = [w.text for w in batch]
                np.add.at(nats, places, each.cpu().numpy())
                np.add.at(counted, places, where.sum(1).cpu().numpy())
                if features:
                    last = out.hidden_states[-1][torch.arange(len(batch)), seen.sum(1) - 1].float().cpu().numpy()
                    states = np.zeros((len(texts), last.shape[1]), np.float32) if states is None else states
                    for row, window in enumerate(batch):
                        if first[window.text] is window:
                            states[window.text] = last[row]
                advance(len(batch))
        tokens: list[list[Ids]] = [[np.zeros(0, np.int64)] for _ in texts]
        for window in windows:
            skip = np.isin(window.ids, [t for t in (self.start, self.end) if t is not None])
            tokens[window.text].append(window.ids[~skip])
        return Reading(
            nats,
            counted,
            windows=np.bincount([w.text for w in windows], minlength=len(texts)),
            tokens=[np.concatenate(parts) for parts in tokens],
            features=states,
        )


def _batches(windows: Sequence[_Window]) -> Iterator[list[_Window]]:
    """Yield batches of at most :data:`TOKENS` tokens, padding included; ``windows`` are sorted, longest first."""
    batch: list[_Window] = []
    for window in windows:
        if batch and (len(batch) + 1) * len(batch[0].ids) > TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _padded(batch: Sequence[_Window], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids int64 [w, l], and bool masks [w, l] of non-padding tokens and of counted tokens."""
    width = max(len(w.ids) for w in batch)
    ids = np.zeros((len(batch), width), np.int64)
    seen, counted = np.zeros((2, len(batch), width), np.bool_)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = window.ids
        seen[row, : len(window.ids)] = True
        counted[row, : len(window.ids)] = window.counted
    made = (torch.from_numpy(a).to(device) for a in (ids, seen, counted))
    return next(made), next(made), next(made)


def open_judge(path: Path, *, device: torch.device) -> Judge:
    """Load a judge from local files.

    Args:
        path: A folder with ``config.json``, a tokenizer and safetensors; a folder with one GGUF file; or a GGUF file.
        device: Device that the judge runs on.

    Returns:
        The judge, in float32 and evaluation mode.

    Raises:
        UserError: ``path`` holds no complete causal language model.
        MissingExtraError: The extra ``hub`` is not installed.
    """
    source = _source(path)
    library = _library()
    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    how |= {"use_safetensors": True} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        with _quiet(library):
            tokenizer = library.AutoTokenizer.from_pretrained(source.folder, **how)
            model, loading = library.AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=torch.float32, output_loading_info=True, **how
            )
            missing = sorted(loading["missing_keys"])
            if missing:  # the library would fill them with random numbers
                raise UserError(
                    f"judge {path} has no weights for {', '.join(missing[:3])}: it is not a complete language model"
                )
            return Judge(model, tokenizer, name=path.resolve().name, sha256=_digest(source.weights), device=device)
    except SeddGraphError:
        raise
    except ImportError as error:
        package = "transformers" if source.gguf is None else "gguf and accelerate"
        reason = str(error).strip().splitlines()[0]
        raise MissingExtraError(package, extra="hub", purpose=f"{PURPOSE} ({reason})") from None
    except Exception as error:  # the library's readers raise many classes for a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"judge {path} cannot be read as a causal language model: {reason}") from None


def _library() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError("transformers", extra="hub", purpose=PURPOSE) from None


@dataclasses.dataclass(frozen=True)
class _Source:
    """Folder of a judge, paths of its weight files, and the name of its GGUF file (None for safetensors)."""

    folder: Path
    weights: list[Path]
    gguf: str | None = None


def _source(path: Path) -> _Source:
    if path.is_file() and path.suffix == ".gguf":
        return _Source(path.parent, [path], path.name)
    if not path.is_dir():
        raise UserError(f"judge {path} is neither a folder nor a .gguf file; models are not downloaded")
    if (path / "config.json").is_file():
        weights = sorted(path.glob("*.safetensors"))
        if not weights:
            raise UserError(f"judge {path} has no *.safetensors (other formats can hold code, and are not read)")
        return _Source(path, weights)
    several = sorted(path.glob("*.gguf"))
    if not several:
        raise UserError(f"judge {path} holds neither config.json nor a GGUF file")
    if len(several) > 1:
        raise UserError(f"judge {path} has several GGUF files; name one of them: {', '.join(p.name for p in several)}")
    return _Source(path, several, several[0].name)


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Disable the progress bars and warnings of ``library``, the module ``transformers``, inside the context."""
    logging = library.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def _digest(files: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**22):
                found.update(block)
    return found.hexdigest()
