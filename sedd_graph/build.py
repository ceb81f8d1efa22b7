"""Entry point of ``python -m sedd_graph.build blueprint.yaml``, equivalent to ``sedd-graph build blueprint.yaml``.

Importing this module sets the attribute ``build`` of the package to the module, which hides the function
:func:`sedd_graph.build`. Therefore the module is callable and calls that function, so that ``sedd_graph.build(...)``
works in either case.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sedd_graph.runs.check import Report, check
    from sedd_graph.runs.open import build

__all__ = ["Report", "build", "check", "main"]

_HOME = {"Report": "sedd_graph.runs.check", "build": "sedd_graph.runs.open", "check": "sedd_graph.runs.check"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the command imports what it needs, and ``--check`` needs little."""
    if name not in _HOME:
        raise AttributeError(f"module 'sedd_graph.build' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def main() -> None:
    """Run the ``build`` subcommand with this process's command-line arguments, and exit with its exit code."""
    from sedd_graph.cli.main import main as command

    command(["build", *sys.argv[1:]])


class _CallableModule(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module(_HOME["build"]).build(*args, **kwargs)


if __name__ == "__main__":
    main()
else:
    sys.modules[__name__].__class__ = _CallableModule
