"""How the processes of a run find each other, and what they say where they do not."""

import os
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from draftcli.core.engine.ranks import open_ranks
from draftcli.errors import DraftpError, InputError
from tests.ranks import free_port, in_ranks

SOON = timedelta(seconds=4)


def test_what_an_earlier_start_left_in_the_store_answers_to_nobody(monkeypatch):
    """torchrun's store outlives its processes; its count of restarts differs between nodes, so it names no start."""
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def work(rank: int) -> int:
        os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": str(restarts[rank])}
        time.sleep(rank)  # the first meets what the second has left
        with open_ranks(SOON) as ranks:
            return ranks.where(True) != [0, 1]

    for restarts in ((0, 0), (0, 1), (1, 1)):
        assert in_ranks(2, work) == [0, 0], restarts
    del store


def test_a_process_that_dies_while_it_connects_is_named():
    def work(rank: int) -> int:
        if rank == 1:
            dist.init_process_group = lambda *arguments, **options: os._exit(9)
        with pytest.raises(DraftpError, match="process 1 was last at: connecting"), open_ranks(SOON):
            pass
        return 0

    assert in_ranks(2, work) == [0, 9]


def test_a_process_that_never_comes_is_named():
    def work(rank: int) -> int:
        if rank == 1:
            return 9
        with (
            pytest.raises(DraftpError, match="not all processes of this run started in time"),
            open_ranks(timedelta(seconds=2)),
        ):
            pass
        return 0

    assert in_ranks(2, work) == [0, 9]


@pytest.mark.parametrize(
    "given",
    [
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "one", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    ],
)
def test_variables_that_no_launcher_sets(monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"WORLD_SIZE is .* start with torchrun"), open_ranks():
        pass


def test_a_first_process_that_is_not_there(monkeypatch):
    port = str(free_port())
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(DraftpError, match=f"process 0 cannot be reached at 127.0.0.1:{port}"),
        open_ranks(timedelta(seconds=2)),
    ):
        pass
