"""Choices that are files: one module of a folder is one choice, known by its file name."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from pagedkv.errors import ConfigError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """The modules of a package as named choices.

    A module registers one object under its own file name (underscores shown as hyphens). Names come from the folder, so that
    listing them imports nothing; a module is imported when its choice is used. Modules that begin with "_" are no choices.

    Example:
        >>> from pagedkv.allocators import ALLOCATORS
        >>> "contiguous-max" in ALLOCATORS.names()
        True
    """

    def __init__(self, package: str, *, kind: str) -> None:
        """Make the registry of `package`; `kind` is what messages call a choice, e.g. "allocator"."""
        self._package = package
        self._kind = kind
        self._registered: dict[str, T] = {}

    def names(self) -> tuple[str, ...]:
        """Return every choice, sorted."""
        spec = importlib.util.find_spec(self._package)
        assert spec is not None
        modules = pkgutil.iter_modules(spec.submodule_search_locations)
        return tuple(sorted(m.name.replace("_", "-") for m in modules if not m.name.startswith("_")))

    def register(self, name: str) -> Callable[[T], T]:
        """Return the decorator that makes an object the choice `name`."""

        def decorate(choice: T) -> T:
            self._registered[name] = choice
            return choice

        return decorate

    def load(self, name: str) -> T:
        """Return the choice `name`, importing its module.

        Raises:
            ConfigError: If there is no such choice (the near ones are named), or its file registers another name.
        """
        if name not in self._registered:
            if name not in self.names():
                raise unknown_name(self._kind, name, self.names())
            module = f"{self._package}.{name.replace('-', '_')}"
            importlib.import_module(module)
            if name not in self._registered:
                raise ConfigError(f"{module} registers no {self._kind} named {name!r}: its name must be that of its file")
        return self._registered[name]
