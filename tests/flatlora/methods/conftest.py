"""The fixture of the method tests."""

import pytest
import torch

from flatlora import methods
from tests.conftest import tiny_llama
from tests.methods_toolbox import batches_of, config_of


@pytest.fixture
def adapt(tmp_path):
    """(name, settings, dtype) → the adapted tiny model, its config and its start."""

    def make(name, *, dtype=torch.float32, folder="start", resumed=False, **settings):
        backbone = tiny_llama().to(dtype).requires_grad_(False)
        backbone.name_or_path = "tiny"
        start = methods.Start(3, tmp_path / folder if folder else None, batches_of, resumed=resumed)
        config = config_of(name, **settings)
        return methods.ADAPTERS[name].apply(backbone, config, start), config, start

    return make
