"""Import paths of version 0.1: the modules below still import under their old names, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType

MOVED = {
    "flatlora.callback": "flatlora.perturb.callback",
    "flatlora.flatness": "flatlora.perturb.flatness",
    "flatlora.layers": "flatlora.perturb.layers",
    "flatlora.perturbation": "flatlora.perturb.perturbation",
    "flatlora.precision": "flatlora.utils.precision",
    "flatlora.methods.lora_pro": "flatlora.optim.lora_pro",
}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module of `MOVED` from its new path."""

    def find_spec(self, name, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is {MOVED[spec.name]} now", DeprecationWarning, stacklevel=2)
        alias = ModuleType(spec.name)
        alias.__dict__.update(vars(importlib.import_module(MOVED[spec.name])))
        return alias

    def exec_module(self, module: ModuleType) -> None:
        """`create_module` has already filled the module."""


sys.meta_path.insert(0, _MovedModules())
