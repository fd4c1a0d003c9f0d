"""A server on loopback that answers as reported."""

import pytest

from tests.loopback import Server


@pytest.fixture
def server():
    made = Server()
    yield made
    made.shutdown()
    made.server_close()
