"""Loading ahead: order, errors, shutdown."""

import itertools
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fastr1.config import DataConfig
from fastr1.video import ClipPrefetcher, load_pixels, loader


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("clip-prefetch")]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert prefetch_threads() == []


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 3, 50])
def test_results_and_order_do_not_depend_on_threads_or_depth(num_threads, depth):
    def load(item):
        time.sleep(0.001 * (7 * item % 5))  # later items often finish first
        return item * item

    with ClipPrefetcher(load, range(20), num_threads=num_threads, depth=depth) as clips:
        assert list(clips) == [(item, item * item) for item in range(20)]
        assert list(clips) == []  # and stays at its end


def test_no_items_give_no_results():
    with ClipPrefetcher(str, [], num_threads=2, depth=2) as clips:
        assert list(clips) == []


def test_an_error_surfaces_at_its_item_and_the_rest_can_still_be_read():
    def load(item):
        if item % 3 == 1:
            raise ValueError(f"item {item}")
        return item

    seen = []
    with ClipPrefetcher(load, range(6), num_threads=3, depth=4) as clips:
        while True:
            try:
                seen.append(next(clips)[1])
            except StopIteration:
                break
            except ValueError as error:
                seen.append(str(error))
    assert seen == [0, "item 1", 2, 3, "item 4", 5]


def test_an_error_of_the_items_comes_after_the_items_before_it():
    def items():
        yield from (1, 2)
        raise OSError("list cut short")

    with ClipPrefetcher(str, items(), num_threads=1, depth=8) as clips:
        assert [next(clips), next(clips)] == [(1, "1"), (2, "2")]
        with pytest.raises(OSError, match="list cut short"):
            next(clips)
        assert list(clips) == []


def test_stop_iteration_in_load_does_not_end_the_run_early():
    def load(item):
        return next(iter([]))

    with (
        ClipPrefetcher(load, [1, 2], num_threads=1, depth=1) as clips,
        pytest.raises(RuntimeError, match="StopIteration"),
    ):
        list(clips)


def test_at_most_depth_items_are_taken_ahead():
    taken = []

    def items():
        for item in itertools.count():
            taken.append(item)
            yield item

    with ClipPrefetcher(lambda item: item, items(), num_threads=4, depth=3) as clips:
        assert taken == [0, 1, 2]
        assert [next(clips), next(clips)] == [(0, 0), (1, 1)]
        assert taken == [0, 1, 2, 3, 4]


def test_next_items_load_while_the_current_one_is_used():
    started = threading.Event()

    def load(item):
        if item == 1:
            started.set()
        return item

    with ClipPrefetcher(load, range(2), num_threads=1, depth=1) as clips:
        assert next(clips) == (0, 0)
        assert started.wait(5), "item 1 was not begun before it was asked for"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, ValueError])
def test_leaving_early_ends_the_threads_and_starts_nothing_more(interrupt):
    loaded = []

    def load(item):
        time.sleep(0.02)
        loaded.append(item)

    def use_one():
        with ClipPrefetcher(load, range(1000), num_threads=2, depth=100) as clips:
            next(clips)
            raise interrupt

    with pytest.raises(interrupt):
        use_one()
    assert prefetch_threads() == []
    count = len(loaded)
    assert count < 10
    time.sleep(0.05)
    assert len(loaded) == count


def test_reading_after_an_early_exit_is_an_error_not_an_early_end():
    with ClipPrefetcher(str, range(3), num_threads=1, depth=3) as clips:
        next(clips)
    clips.close()  # a second time does no harm
    with pytest.raises(RuntimeError, match="closed"):
        next(clips)


@pytest.mark.parametrize(("num_threads", "depth"), [(0, 1), (1, 0)])
def test_counts_below_one_are_refused(num_threads, depth):
    with pytest.raises(ValueError, match=f"got {num_threads} and {depth}"):
        ClipPrefetcher(str, [], num_threads=num_threads, depth=depth)


def test_torch_has_no_helpers_in_the_threads_that_load_and_keeps_them_elsewhere():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        barrier = threading.Barrier(4)  # one item for each of the threads

        def load(_):
            barrier.wait(10)
            return torch.get_num_threads()

        with ClipPrefetcher(load, range(4), num_threads=4, depth=4) as prefetcher:
            assert [found for _, found in prefetcher] == [1, 1, 1, 1]
        elsewhere = [torch.get_num_threads()]
        thread = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert elsewhere == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_a_gpu_loads_in_a_stream_of_its_own_and_is_done_when_the_pixels_are_there(monkeypatch):
    """On a GPU that is not there: what is asked of it, in which order, and in which stream."""
    said, current = [], ["training"]
    stream = SimpleNamespace(synchronize=lambda: said.append(("wait", current[0])))
    pixels = SimpleNamespace(record_stream=lambda reader: said.append(("read by", reader)))

    @contextmanager
    def inside(entered):
        assert entered is stream
        current[0] = "own"
        yield
        current[0] = "training"

    def load_clip(path, **options):
        said.append(("decode", current[0]))
        return SimpleNamespace(frames=path)

    def preprocess(frames):
        said.append(("resize", current[0]))
        return pixels

    loader._loading_stream.cache_clear()
    monkeypatch.setattr(loader, "load_clip", load_clip)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    for _ in range(2):
        note = lambda clip: said.append(("note", current[0]))  # noqa: E731
        assert load_pixels("clip.mp4", DataConfig(), preprocess, torch.device("cuda", 0), note) is pixels
    loader._loading_stream.cache_clear()
    once = [("decode", "own"), ("note", "own"), ("resize", "own"), ("wait", "training"), ("read by", "training")]
    assert said == once * 2
