"""A registry of plug-ins: adapter methods, regularizers, data sets, benchmarks."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Name → plug-in. A module registers its plug-ins when it is imported; the registry imports it on demand.

    A name is looked up in the module of that name first, then in all modules of the packages.

    Args:
        kind: what the plug-ins are called in messages, such as "peft method".
        packages: packages whose modules register plug-ins.
    """

    def __init__(self, kind: str, *packages: str) -> None:
        self.kind, self.packages = kind, packages
        self._items: dict[str, T] = {}
        self._all_imported = False

    def add(self, name: str, item: T) -> T:
        """Register a plug-in under a name.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._items:
            raise ValueError(f"Invalid name={name}: a {self.kind} of this name exists already; choose another name.")
        self._items[name] = item
        return item

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator: registers an instance of the class."""

        def decorate(cls: type) -> type:
            self.add(name, cls())
            return cls

        return decorate

    def __getitem__(self, name: str) -> T:
        if name not in self._items and not self._all_imported:
            self._import(lambda module: module == name)
        if name not in self._items:
            self._import_all()
        if name not in self._items:
            raise KeyError(f"Unknown {self.kind} {name}: known are {', '.join(self)}.")
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        self._import_all()
        return iter(sorted(self._items))

    def __len__(self) -> int:
        self._import_all()
        return len(self._items)

    def _import_all(self) -> None:
        if not self._all_imported:
            self._import(lambda module: module != "__main__")
            self._all_imported = True

    def _import(self, wanted: Callable[[str], bool]) -> None:
        for package in self.packages:
            for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
                if wanted(module.name) and not module.ispkg:
                    importlib.import_module(f"{package}.{module.name}")
