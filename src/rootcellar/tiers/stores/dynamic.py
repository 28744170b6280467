"""A store that its user wrote: any class with the calls of ``Store``, found by the name of its module.

Settings: ``module_path`` (a module that can be imported, or a file that ends in ``.py``), ``class_name``, and whatever
the class itself takes. It is called with those others, a mapping, and the identity of the engine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from rootcellar.errors import ConfigError
from rootcellar.tiers.settings import take_text
from rootcellar.tiers.store import Store

_CALLS = ("has", "get", "put", "clear", "register", "close")


def open_store(extra: Mapping[str, object], identity: str) -> Store:
    """See ``registry``."""
    own = dict(extra)
    own.pop("backend_name", None)  # SGLang's users give one; the log calls this store by its kind
    return open_class(take_text(own, "module_path"), take_text(own, "class_name"), own, identity)


def open_class(module_path: str, class_name: str, own: Mapping[str, object], identity: str) -> Store:
    """An object of a class of a module. Raises ``ConfigError`` where there is none, or it is no store."""
    module = _load(module_path)
    if class_name not in vars(module):
        raise ConfigError(f"class_name={class_name!r} is not allowed: {module_path} has no such class")
    try:
        store: Store = vars(module)[class_name](own, identity)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{class_name} of {module_path} could not be opened: {error!r}") from error
    missing = [name for name in (*_CALLS, "verifies") if name not in dir(store)]
    if missing:
        raise ConfigError(f"{class_name} of {module_path} is no store: it lacks {', '.join(missing)}")
    return store


def _load(path: str) -> ModuleType:
    try:
        if not path.endswith(".py"):
            return import_module(path)
        file = Path(path).expanduser().resolve()
        name = f"rootcellar_dynamic_{file.stem}"
        spec = spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:
        raise ConfigError(f"module_path={path!r} is not allowed: it cannot be imported: {error!r}") from error
