"""Lets transformers open saved mixtures, without importing it.

`AutoModel.from_pretrained(folder)` and `SentenceTransformer(folder)` know a saved mixture as soon
as moefold and transformers are both imported, in either order. Where transformers comes second,
Python is asked to tell when it comes: an entry of `sys.meta_path` that finds nothing itself.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import final

_MODULE = "transformers.models.auto.modeling_auto"
"""The last of transformers' own modules that a registration needs."""


def register_when_possible() -> None:
    """Registers the saved forms now if transformers is there, otherwise when it is imported."""
    if _MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    from moefold.surgery.hosts import auto

    auto.register_configs()


@final
class _Watcher(importlib.abc.MetaPathFinder):
    """Lets the others find the module, and has `_Loader` load it."""

    def find_spec(
        self,
        fullname: str,
        path: object,  # a list, or what pytest and others put in its place
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Finds one module, by asking the finders after this one."""
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


@final
class _Loader(importlib.abc.Loader):
    """Loads a module as another loader does, and registers then."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the other loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the other loader does; then the registration."""
        spec = module.__spec__
        assert spec is not None
        spec.loader = self._loader
        self._loader.exec_module(module)
        _register()
