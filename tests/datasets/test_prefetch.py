import threading
import time

import pytest

from domainbed_hp.datasets.loading.prefetch import AHEAD, ThreadPool
from domainbed_hp.registry import UsageError


def slow_square(i):
    time.sleep(0.02 if i % 3 == 0 else 0)
    return i * i


@pytest.mark.parametrize("number", [0, 1, 3])
def test_results_come_in_order(number):
    with ThreadPool(number) as workers:
        assert list(workers.map(slow_square, range(20))) == [i * i for i in range(20)]


def test_only_so_much_is_done_ahead():
    started = []
    with ThreadPool(2) as workers:
        results = workers.map(lambda i: started.append(i) or i, range(100))
        assert next(results) == 0
        time.sleep(0.1)
        assert len(started) <= 2 + AHEAD + 1
        results.close()


def test_without_workers_the_caller_does_the_work_when_it_asks():
    threads = []
    results = ThreadPool(0).map(lambda i: threads.append(threading.current_thread()) or i, range(3))
    assert threads == [] and next(results) == 0 and threads == [threading.main_thread()]


def test_loaders_share_the_threads():
    names = set()

    def note(i):
        names.add(threading.current_thread().name)
        time.sleep(0.001)

    with ThreadPool(2) as workers:
        training = workers.map(note, range(50))
        next(training)
        list(workers.map(note, range(50)))
        list(training)
    assert len(names) == 2


@pytest.mark.parametrize("number", [0, 2])
def test_an_error_arrives_as_it_was_raised(number):
    def fail(i):
        if i == 3:
            raise UsageError("picture.jpg: cannot decode this image")
        return i

    with ThreadPool(number) as workers:
        results = workers.map(fail, range(10))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(UsageError, match="^picture.jpg: cannot decode this image$"):
            next(results)


def test_no_thread_outlives_a_run():
    before = threading.active_count()
    with ThreadPool(3) as workers:
        next(workers.map(slow_square, range(100)))
    assert threading.active_count() == before
