"""Import paths of version 0.1 still give the public names."""

import importlib
import sys

import pytest

from flatlora._moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_path_gives_the_same_objects(old, new):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=new):
        module = importlib.import_module(old)
    moved = importlib.import_module(new)
    names = [name for name in vars(moved) if not name.startswith("__")]
    assert names
    assert all(getattr(module, name) is getattr(moved, name) for name in names)


def test_other_names_are_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flatlora.nowhere")
