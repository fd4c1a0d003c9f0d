"""Two nodes, imitated by network namespaces: one is killed or loses its network, and both begin again."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import adapter_bytes, metrics_rows, run_folder
from tests.processes import ENVIRONMENT, PROJECT

_OWN = os.getpid()  # a worker of pytest-xdist has namespaces of its own
FIRST, SECOND = f"fl{_OWN}a", f"fl{_OWN}b"  # names of the nodes, and of their network devices
NODES = {FIRST: "10.77.0.1", SECOND: "10.77.0.2"}
RENDEZVOUS = "10.77.0.1:29411"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def network():
    """Two namespaces that a cable joins; skipped without the right to make them. Kills what still runs in them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2")
    try:
        for name in NODES:
            ip("netns", "add", name)
        ip("link", "add", FIRST, "type", "veth", "peer", "name", SECOND)
        for name, address in NODES.items():
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", name, "up")
    except subprocess.CalledProcessError as error:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    nodes: list[Node] = []
    try:
        yield nodes
    finally:
        for node in nodes:
            node.kill()
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


class Node:
    """torchrun on one of the nodes, with one process; its output is in `log`."""

    def __init__(self, name: str, words: list[str], log: Path) -> None:
        address = NODES[name]
        host = str(address == RENDEZVOUS.partition(":")[0]).lower()  # names of hosts do not resolve in a namespace
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += ["--nproc_per_node=1", "--rdzv_id=7", "--rdzv_backend=c10d", f"--rdzv_endpoint={RENDEZVOUS}"]
        command += [f"--rdzv_conf=is_host={host}", f"--local_addr={address}", "run_exp.py", *words]
        self.log = log
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": name}
        with open(log, "w") as file:
            self.process = psutil.Popen(command, cwd=PROJECT, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*self.process.children(recursive=True), self.process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def has_lost_its_process(self) -> bool:
        return "The run failed" in self.log.read_text()


def start(network: list[Node], words: list[str], folder: Path) -> list[Node]:
    """Starts a run on both nodes, which `network` keeps."""
    started = [Node(name, words, folder / f"{name}.log") for name in NODES]
    network += started
    return started


def until(ready, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def steps_of(words: list[str]) -> int:
    (root,) = [Path(word.partition("=")[2]) for word in words if word.startswith("results_root=")]
    return max((len(metrics_rows(path.parent)) for path in root.glob("*/*/*/metrics.jsonl")), default=0)


def train(network: list[Node], words: list[str], folder: Path) -> Path:
    nodes = start(network, words, folder)
    assert [node.process.wait(240) for node in nodes] == [0, 0], nodes[0].log.read_text()[-2000:]
    return run_folder(words)


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_a_node_that_is_killed_or_loses_its_network_ends_the_other_and_both_go_on(
    network, tiny_settings, tmp_path, trainer
):
    kept = [word for word in tiny_settings if not word.startswith(("results_root=", "optim.batch_size="))]
    kept += [f"trainer={trainer}", "trainer.timeout_s=15", "trainer.save_steps=2", "optim.batch_size=4"]
    kept += ["optim.epochs=20", "rho=flat"]
    whole = train(network, [*kept, f"results_root={tmp_path / 'whole'}"], tmp_path)
    words = [*kept, f"results_root={tmp_path / 'hurt'}"]
    lost = "lost another process of the run"

    first, second = start(network, words, tmp_path)
    until(lambda: steps_of(words) >= 10)
    second.kill()
    assert first.process.wait(60) == 1
    assert lost in " ".join(first.log.read_text().split())

    first, second = start(network, ["resume=true", *words], tmp_path)
    until(lambda: steps_of(words) >= 40)
    ip("-n", SECOND, "link", "set", SECOND, "down")
    until(lambda: first.has_lost_its_process() and second.has_lost_its_process(), 60)
    for node in (first, second):  # torchrun itself waits longer for the rendezvous
        assert lost in " ".join(node.log.read_text().split())
        node.kill()
    ip("-n", SECOND, "link", "set", SECOND, "up")

    folder = train(network, ["resume=true", *words], tmp_path)
    assert adapter_bytes(folder) == adapter_bytes(whole)
    assert metrics_rows(folder) == metrics_rows(whole)
