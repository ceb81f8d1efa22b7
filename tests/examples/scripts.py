"""The scripts of examples/, imported as modules."""

import importlib.util
import sys
from types import ModuleType

from tests.conftest import ROOT


def script(path: str) -> ModuleType:
    """Return the script ``examples/<path>`` as a module."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / "examples" / path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
