"""The scripts that make pages of docs/."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load_script(file: Path) -> ModuleType:
    """A script outside of the package as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
