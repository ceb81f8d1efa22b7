"""``python -m sedd_graph.build blueprint.yaml`` is ``sedd-graph build blueprint.yaml``.

``sedd_graph.build`` is also the name of the function that builds; importing this module must not hide it, so the module
can be called as well.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from sedd_graph.runs.check import Report, check
from sedd_graph.runs.open import build

__all__ = ["Report", "build", "check", "main"]


def main() -> None:
    """The ``build`` command with this process's arguments."""
    from sedd_graph.cli.main import main as command

    command(["build", *sys.argv[1:]])


class _CallableModule(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return build(*args, **kwargs)


if __name__ == "__main__":
    main()
else:
    sys.modules[__name__].__class__ = _CallableModule
