"""Plug-ins are found by name, wherever in their packages they are."""

import sys

import pytest

from flatlora.utils.registry import Registry


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Two modules: one registers a plug-in of its own name, the other two of other names."""
    package = tmp_path / "toy_plugins"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from flatlora.utils.registry import Registry\nTOYS = Registry('toy', 'toy_plugins')\n"
    )
    (package / "red.py").write_text("from toy_plugins import TOYS\nTOYS.add('red', 1)\n")
    (package / "others.py").write_text("from toy_plugins import TOYS\nTOYS.add('green', 2)\nTOYS.add('blue', 3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import toy_plugins

    yield toy_plugins.TOYS
    for name in [name for name in sys.modules if name.startswith("toy_plugins")]:
        del sys.modules[name]


def test_a_name_is_looked_for_in_the_module_of_that_name(registry):
    assert registry["red"] == 1
    assert "toy_plugins.others" not in sys.modules


def test_then_in_all_modules(registry):
    assert registry["blue"] == 3
    assert list(registry) == ["blue", "green", "red"]
    assert len(registry) == 3


def test_an_unknown_name_lists_the_known(registry):
    with pytest.raises(KeyError, match="Unknown toy pink: known are blue, green, red"):
        registry["pink"]


def test_a_name_is_taken_once(registry):
    with pytest.raises(ValueError, match="choose another name"):
        registry.add("blue", registry["blue"])


def test_a_class_registers_its_instance():
    toys = Registry("toy")

    @toys.register("ball")
    class Ball:
        pass

    assert isinstance(toys["ball"], Ball)
