import itertools
import threading
import time

import pytest

from bkd_fast.inference.streaming import pipeline


def run(items, before=lambda x: x, together=lambda xs: xs, after=lambda item, x: (item, x), batch=4, workers=2):
    return pipeline(items, before, together, after, batch=batch, workers=workers)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 50])
def test_results_come_in_order_whatever_takes_longer(count):
    def before(x):
        time.sleep(0.002 * (x % 3))
        return 2 * x

    def after(item, x):
        time.sleep(0.002 * ((item + 1) % 3))
        return item, x

    found = list(run(range(count), before, lambda xs: [x + 1 for x in xs], after))
    assert [(one.item, one.result) for one in found] == [(x, (x, 2 * x + 1)) for x in range(count)]
    assert all(one.error is None for one in found)


def test_batches_are_full_where_the_source_is_fast_and_never_larger():
    sizes = []

    def together(xs):
        time.sleep(0.02)
        sizes.append(len(xs))
        return xs

    list(run(range(23), together=together))
    assert max(sizes) == 4
    assert sum(sizes) == 23
    assert len(sizes) <= 8  # the first may be small


def test_a_slow_source_is_not_waited_for():
    """Each result arrives before the next item is made."""
    received = threading.Event()

    def items():
        for number in range(5):
            received.clear()
            yield number
            assert received.wait(10), "the stream waits for more items before it gives a result"

    for _ in run(items()):
        received.set()


def test_an_error_of_one_item_is_its_own():
    def before(x):
        if x == 3:
            raise ValueError("cannot be read")
        return x

    def after(item, x):
        if item == 6:
            raise OSError("cannot be written")
        return x

    found = list(run(range(8), before, after=after))
    assert [one.item for one in found] == list(range(8))
    assert [one.result for one in found] == [0, 1, 2, None, 4, 5, None, 7]
    assert str(found[3].error) == "cannot be read"
    assert str(found[6].error) == "cannot be written"


def test_errors_of_the_source_come_after_the_results_before_it():
    def items():
        yield from range(6)
        raise RuntimeError("the camera is gone")

    stream = run(items())
    assert [next(stream).result[0] for _ in range(6)] == list(range(6))
    with pytest.raises(RuntimeError, match="the camera is gone"):
        next(stream)


def test_errors_of_the_middle_stage_end_the_stream():
    def together(xs):
        raise MemoryError

    with pytest.raises(MemoryError):
        list(run(range(6), together=together))


def test_a_slow_caller_holds_the_source_back():
    taken = []

    def items():
        for number in itertools.count():
            taken.append(number)
            yield number

    stream = run(items(), batch=4)
    for _ in range(5):
        next(stream)
        time.sleep(0.05)
    assert 5 <= len(taken) <= 5 + 3 * 4 + 1
    stream.close()


def test_an_abandoned_stream_ends_its_threads():
    stream = run(itertools.count())
    next(stream)
    stream.close()
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("stream") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, [thread.name for thread in threading.enumerate()]
        time.sleep(0.01)
