"""Lets transformers open saved mixtures, without importing it.

`AutoModel.from_pretrained(folder)` and `SentenceTransformer(folder)` know a saved mixture as soon
as moefold and transformers are both imported, in either order. Where transformers comes second,
Python is asked to tell when it comes: an entry of `sys.meta_path` that finds nothing itself.

    AutoConfig   moefold_bert -> "MoefoldBertConfig" -> moefold.surgery.hosts.auto makes the class

Names are registered, not classes: transformers comes to this module in the middle of importing
others, whose classes are not there yet.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType
from typing import Any, final

_MODULE = "transformers.models.auto.configuration_auto"
"""The module of transformers that knows the types of models."""

MODEL_TYPES = (
    *("bert", "roberta", "xlm-roberta", "mpnet", "deberta-v2", "distilbert", "modernbert"),
    *("t5", "umt5"),
    *("vit", "deit", "dinov2", "clip", "clip_vision_model", "clip_text_model"),
    *("siglip", "siglip_vision_model", "siglip_text_model"),
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text", "phi3"),
    *("gpt2", "gpt_neox", "olmo", "olmo2"),
)
"""Types of models whose saved mixtures the Auto classes of transformers open.

`moefold.load` opens any.
"""

PREFIX = "moefold_"
"""How the type of a config with mixtures begins."""

NAME = "Moefold"
"""How the name of a class with mixtures begins."""


def register_when_possible() -> None:
    """Registers the saved forms now if transformers is there, otherwise when it is imported."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register(module: Any) -> None:
    try:
        known = module.CONFIG_MAPPING
        for model_type in MODEL_TYPES:
            if model_type not in known._mapping:  # an older transformers may lack one
                continue
            own = PREFIX + model_type
            known._mapping[own] = NAME + known._mapping[model_type]
            known._modules[module.model_type_to_module_name(own)] = _Later()
    except AttributeError as error:
        warnings.warn(
            f"the Auto classes of this version of transformers cannot be told of saved mixtures "
            f"({error}); moefold.load opens them",
            stacklevel=2,
        )


class _Later:
    """Stands for the module that makes the classes, imported when one of them is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("moefold.surgery.hosts.auto"), name)


@final
class _Watcher(importlib.abc.MetaPathFinder):
    """Lets the others find the module, and has `_Loader` load it; gone once that is done."""

    def find_spec(
        self,
        fullname: str,
        path: Any,  # a list, or what pytest and others put in its place
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Finds one module, by asking the other finders."""
        if fullname != _MODULE:
            return None
        for finder in sys.meta_path:
            find = None if isinstance(finder, _Watcher) else getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


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
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Watcher)]
        _register(module)
