"""Where workers meet: threads stand for them, as all of it is one store."""

import socket
import threading
from datetime import timedelta

import pytest

from bnext.engine.rendezvous import check_address, is_loopback, meet
from bnext.errors import LaunchError


@pytest.fixture
def url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"tcp://127.0.0.1:{port}"


def meet_all(url, *workers, seconds=10):
    """What each worker, (rank, size, workers_per_machine), gets: a store, or an error's words."""
    results = [None] * len(workers)

    def work(index, rank, size, per_machine):
        try:
            results[index] = meet(url, rank, size, per_machine, timedelta(seconds=seconds))
        except LaunchError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=work, args=(index, *worker)) for index, worker in enumerate(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_all_come(url):
    first, second = meet_all(url, (0, 2, 1), (1, 2, 1))
    first.set("word", "x")
    assert second.get("word") == b"x"


def test_two_machines_of_one_rank_are_told_all(url):
    """The one of rank 0 on another host: its own port is free, and it asks machine 0's store."""
    results = meet_all(url, (0, 3, 1), (1, 3, 1), (1, 3, 1), seconds=60)
    assert len({str(result) for result in results}) == 1
    assert "--machine-rank" in results[0]


def test_other_numbers_are_told_all(url):
    results = meet_all(url, (0, 4, 2), (2, 6, 2), seconds=60)
    assert "4 workers" in results[0]
    assert "6 workers" in results[0]
    assert results[0] == results[1]


def test_who_does_not_come_is_named(url):
    (result,) = meet_all(url, (0, 3, 1), seconds=0.5)
    assert "worker(s) 1, 2 of 3" in result


def test_machine_0_that_does_not_answer_is_named(url):
    (result,) = meet_all(url, (1, 2, 1), seconds=0.5)
    assert url in result


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        (result,) = meet_all(url, (0, 2, 1))
    assert result.startswith("the port of --dist-url must be free")
    assert url in result


@pytest.mark.parametrize("url", ["10.0.0.1:29500", "tcp://10.0.0.1", "tcp://:29500", "tcp://host:port"])
def test_addresses_where_nobody_meets_are_refused(url):
    with pytest.raises(LaunchError, match=url):
        check_address(url)


def test_loopback():
    assert is_loopback("tcp://127.0.0.1:1")
    assert is_loopback("tcp://localhost:1")
    assert not is_loopback("tcp://10.0.0.1:1")
    assert not is_loopback("env://")
