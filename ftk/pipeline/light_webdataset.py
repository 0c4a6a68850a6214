"""The webdataset library, imported without torch.

webdataset takes the base classes of its pipelines from torch where torch is installed: a second and 150 MB for a process
that encodes nothing. Where torch is missing it has empty classes in their place, which serve as well here: ftk iterates over
pipelines itself and has no use for torch's DataLoader.
"""

import functools
import importlib
import importlib.abc
import sys
import threading
from types import ModuleType
from typing import Any

_NAME = "webdataset"


class _WithoutTorch(importlib.abc.MetaPathFinder):
    """Makes torch look uninstalled to one thread; other threads may import it meanwhile."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> None:
        if fullname == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("torch is hidden from this import", name=fullname)


@functools.cache
def load() -> ModuleType:
    """The `webdataset` package; importing it does not import torch, but uses it where it is imported already."""
    if "torch" in sys.modules or _NAME in sys.modules:
        return importlib.import_module(_NAME)
    finder = _WithoutTorch()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(_NAME)
    finally:
        sys.meta_path.remove(finder)
        # Whoever imports webdataset later in this process may need the pipelines that a DataLoader accepts.
        for name in [name for name in sys.modules if name == _NAME or name.startswith(f"{_NAME}.")]:
            del sys.modules[name]
