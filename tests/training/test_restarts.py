"""Workers that torchrun starts again must not meet the addresses of those that died, which its store still has."""

import os
import time
import traceback

import pytest
import torch
from torch.distributed import TCPStore

from sedd_graph.training.distributed import World

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def join(rank: int, restart: int, port: int, *, late: float) -> int:
    """Join the process group of two in a fork, after some seconds, and return the process id."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            time.sleep(late)
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
            elastic = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(restart)}
            os.environ.update(shared | elastic | {"RANK": str(rank)})
            world = World.from_environment(torch.device("cpu"))
            code = 0 if world.gather([rank]) == [[0], [1]] else 2
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)  # without leaving the group, as when it is killed
    return pid


def test_workers_that_are_started_again_find_each_other() -> None:
    """The second of the new workers comes late, so that the first could find the address of the old one."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for restart in (0, 1):
        pids = [join(rank, restart, store.port, late=1.0 * rank * restart) for rank in (0, 1)]
        end, codes = time.monotonic() + 120, dict[int, int]()
        while len(codes) < 2 and time.monotonic() < end:
            for pid in set(pids) - codes.keys():
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        for pid in set(pids) - codes.keys():
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        assert [codes.get(pid) for pid in pids] == [0, 0], f"workers of restart {restart}"
