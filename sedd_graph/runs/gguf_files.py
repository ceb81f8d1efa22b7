"""Weights and tokenizer of a decoder in a GGUF file, read by the transformers library (extra ``hub``).

Quantised weights are converted to float32, and have the names that the library gives them. Nothing is downloaded, and no
code that comes with a model is run.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd_graph.errors import MissingExtraError, UserError
from sedd_graph.inputs.files import require_file

__all__ = ["gguf_tokenizer", "gguf_weights"]

PURPOSE = "a GGUF file"
MAX_BYTES = 64 * 2**30


def gguf_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a GGUF file by their names in the transformers library, float32. Tied weights appear once.

    Raises:
        UserError: The file is no decoder that the library reads.
        MissingExtraError: The extra ``hub`` is not installed.
    """
    require_file(path, limit=MAX_BYTES)
    with _reading(path) as library:
        model, loading = library.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, **_LOCAL
        )
    if missing := sorted(loading["missing_keys"]):  # the library would fill them with random numbers
        raise UserError(f"{path} has no weights for {', '.join(missing[:3])}: it is not a complete language model")
    names = {name for name, _ in model.named_parameters()}  # each tied parameter once
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name in names}


def gguf_tokenizer(path: Path) -> str:
    """Return the tokenizer of a GGUF file in the format of the ``tokenizers`` library, JSON.

    Raises:
        UserError: The library cannot convert it.
        MissingExtraError: The extra ``hub`` is not installed.
    """
    require_file(path, limit=MAX_BYTES)
    with _reading(path) as library:
        tokenizer = library.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **_LOCAL)
        text: str = tokenizer.backend_tokenizer.to_str()
    return text


_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Context manager that yields the library, silent, and converts its faults to :class:`UserError`."""
    try:
        library = importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError("transformers", extra="hub", purpose=PURPOSE) from None
    logging = library.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield library
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingExtraError("gguf and accelerate", extra="hub", purpose=f"{PURPOSE} ({reason})") from None
    except Exception as error:  # the library's readers raise many classes for a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read as a decoder: {reason}") from None
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
