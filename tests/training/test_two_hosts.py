"""Two hosts, each of which is a network namespace with its own address, train one model by ``torchrun``."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sedd_graph.cli import main as cli
from tests.conftest import ROOT, SMALL

CPU = ["--device", "cpu"]
INTERFACE = "host0"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Addresses of two namespaces, by name, which reach each other and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (iproute2)")
    found = {f"sedd-graph-{os.getpid()}-{n}": f"10.213.77.{n}" for n in (1, 2)}
    one, two = found
    made = list[str]()
    try:
        try:
            for name in found:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", INTERFACE, "netns", one, "type", "veth", "peer", "name", INTERFACE, "netns", two)
            for name, address in found.items():
                ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                for interface in (INTERFACE, "lo"):
                    ip("-n", name, "link", "set", interface, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made: {error.stderr.strip()}")
        yield found
    finally:
        for name in made:
            ip("netns", "delete", name)


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_two_hosts_have_the_losses_of_one_process(hosts: dict[str, str], tmp_path: Path) -> None:
    """Shards over both hosts; the commands are those of docs/how-to/many-gpus.md."""
    (tmp_path / "small.yaml").write_text(SMALL)
    where = ["--runs", str(tmp_path / "runs"), "--path-to", str(tmp_path / "at"), *CPU]
    settings = ["train.parallel={shard: null}"]
    assert cli.run(["build", str(tmp_path / "small.yaml"), "--proof", "quick", *where, *settings]) == 0
    one = Path((tmp_path / "at").read_text())
    two = shutil.copytree(one, tmp_path / "two")
    assert cli.run(["train", str(one), *CPU]) == 0
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "TP_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",
    }
    first = next(iter(hosts.values()))
    started, logs = [], []
    for name, address in hosts.items():
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", "2", "--nproc-per-node", "1", "--local-addr", address]
        command += ["--rdzv-id", "two", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:29400"]
        command += ["--rdzv-conf", f"is_host={int(address == first)}"]
        logs.append(tmp_path / f"{name}.log")
        with logs[-1].open("w") as log:
            command += ["-m", "sedd_graph", "train", str(two), "--resume", "auto", *CPU]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(600) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    last = two / "checkpoints" / "step-00000006"
    assert {path.name for path in last.glob("model-*")} == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
