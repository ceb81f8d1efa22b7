"""Without a network, whatever needs one says so within seconds."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sedd_graph.data.network import unreachable

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def closed() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def test_a_host_that_listens_is_reached_also_as_a_proxy(monkeypatch: pytest.MonkeyPatch, closed: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert unreachable(f"http://127.0.0.1:{port}") is None
        assert unreachable(f"http://127.0.0.1:{closed}") == "Connection refused"
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{port}")
        assert unreachable("http://no.such.host.invalid") is None
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert unreachable(f"http://127.0.0.1:{closed}") == "Connection refused"


def test_a_name_that_is_never_resolved_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def resolve(*_: object, **__: object) -> None:
        released.wait()
        raise OSError("no such host")

    monkeypatch.setattr("socket.create_connection", resolve)
    assert unreachable("https://example.org", seconds=0.1) == "no answer within 0.1 s"
    released.set()


CORPUS = """
from pathlib import Path
from sedd_graph_registry.data.corpora import HubDataset
from sedd_graph.errors import EnvironmentFault
try:
    next(HubDataset(HubDataset.Config(name="no/such")).documents(Path(".")))
except EnvironmentFault as error:
    print(error)
"""
TRACKER = """
from pathlib import Path
from sedd_graph_registry.training.trackers import Wandb
from sedd_graph.training.trackers import Trackers
Trackers(Path("."), "name", [Wandb(Wandb.Config())])
"""


@pytest.mark.parametrize(("package", "program", "said"), [
    ("datasets", CORPUS, "data.corpus: the data set 'no/such' is neither in a folder nor in the cache of the datasets library, and {url} cannot be reached: Connection refused"),
    ("wandb", TRACKER, "the tracker 'wandb' did not start and is disabled; training continues without it: {url} cannot be reached (Connection refused); set WANDB_MODE=offline"),
])  # fmt: skip
def test_services_are_named_without_retries(tmp_path: Path, closed: int, package: str, program: str, said: str) -> None:
    pytest.importorskip(package)
    url = f"http://127.0.0.1:{closed}"
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "WANDB_BASE_URL": url, "HOME": str(tmp_path)}
    ours |= {"WANDB_API_KEY": "0" * 40}
    left_out = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**{k: v for k, v in os.environ.items() if k not in left_out}, **ours},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,  # with retries it takes longer
        check=True,
    )
    assert said.format(url=url) in done.stdout + done.stderr
