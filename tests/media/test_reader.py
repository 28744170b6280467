"""Pictures in a process of their own: the same as in ours, whoever dies of them, and no tenant in another's way."""

import gc
import random
import signal
import time
from concurrent.futures import wait
from dataclasses import replace

import numpy as np
import pytest
from hostile import encoded, image, picture, png, text
from PIL import Image

from rootcellar.config import EngineConfig
from rootcellar.errors import EngineError, QueueFull, RequestError, RequestTooLarge
from rootcellar.media import MediaLimits, read_all
from rootcellar.media import reader as reading
from rootcellar.media.reader import PictureReader

LIMITS = replace(MediaLimits.of(EngineConfig()), max_image_pixels=40_000, max_request_pixels=50_000)


@pytest.fixture(scope="module")
def reader():
    reader = PictureReader(LIMITS, request_bytes=2**20, processes=1)
    yield reader
    reader.close()


def let_go(reader: PictureReader) -> int:
    """Pixels that are still held when all has been let go that will be."""
    end = time.monotonic() + 5
    while reader.held_pixels and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return reader.held_pixels


def test_what_comes_out_is_what_comes_out_here(reader):
    rng = random.Random(1)
    sources = [encoded(picture(rng, "RGBA"), "PNG"), encoded(picture(rng, "RGB"), "JPEG")]
    pictures = reader.read(sources).result(60)
    assert pictures == list(read_all(sources, LIMITS))
    np.testing.assert_array_equal(pictures[0].pixels, next(read_all(sources, LIMITS)).pixels)
    assert not pictures[0].pixels.flags.writeable
    assert reader.held_pixels == sum(each.width * each.height for each in pictures)
    del pictures
    assert let_go(reader) == 0


def test_errors_are_those_of_ours_and_leave_the_process_as_it_was(reader):
    assert reader.read([encoded(Image.new("L", (2, 2)), "PNG")]).result(60)
    process = reader._children[0]._process.pid
    with pytest.raises(RequestTooLarge, match="max_request_pixels"):
        reader.read([png(190, 200, b"")] * 2).result(60)
    with pytest.raises(RequestError, match="image 1: a broken image"):
        reader.read([encoded(Image.new("L", (2, 2)), "PNG"), png(9, 9, b"")]).result(60)
    assert reader._children[0]._process.pid == process
    assert let_go(reader) == 0


def test_what_dies_of_an_image_is_one_request(reader, monkeypatch):
    assert reader.read([encoded(Image.new("L", (2, 2)), "PNG")]).result(60)
    reader._children[0]._process.kill()
    future = reader.read([encoded(Image.new("L", (3, 3)), "PNG")])
    wait([future], 60)
    del future  # which has its image where the process was gone before it was asked
    assert reader.read([encoded(Image.new("L", (4, 4)), "PNG")]).result(60)
    monkeypatch.setattr(reader, "_limits", replace(LIMITS, media_timeout=0.1))
    reader._children[0]._process.send_signal(signal.SIGSTOP)
    with pytest.raises(RequestError, match="media_timeout"):
        reader.read([encoded(Image.new("L", (5, 5)), "PNG")]).result(60)
    monkeypatch.undo()
    assert reader.read([encoded(Image.new("L", (4, 4)), "PNG")]).result(60)
    assert let_go(reader) == 0


def test_who_holds_much_waits_and_others_do_not(reader):
    large = encoded(Image.new("RGB", (200, 200)), "PNG")
    held = reader.read([large], "a").result(60)
    another = reader.read([large], "a")
    other = reader.read([large], "b").result(60)
    time.sleep(0.1)
    assert not another.done()
    del held
    gc.collect()
    assert another.result(60) == other


def test_of_a_picture_is_held_what_a_model_looks_at_and_who_cannot_be_is_told_of_alone():
    def prepare(pixels):
        if pixels.shape[1] > 150:
            raise RequestError("too wide")
        return np.asarray(Image.fromarray(pixels).resize((10, 20)))

    reader = PictureReader(LIMITS, request_bytes=2**20, processes=1, prepare=prepare)
    sources = [encoded(Image.new("RGB", size, "red"), "PNG") for size in ((100, 100), (60, 40))]
    pictures = reader.read(sources).result(60)
    assert [(each.pixels.shape, each.prepared) for each in pictures] == [((20, 10, 3), True)] * 2
    assert pictures == list(read_all(sources, LIMITS)), "the same pictures by their digests"
    assert reader.held_pixels == 2 * 200
    with pytest.raises(RequestError, match="image 0: too wide"):
        reader.read([encoded(Image.new("RGB", (200, 40)), "PNG"), *sources]).result(60)
    assert reader.read(sources).result(60) == pictures, "its process was heard to the end"
    del pictures
    assert let_go(reader) == 0
    reader.close()


def test_lines_take_turns_and_have_an_end(reader, monkeypatch):
    small = encoded(Image.new("RGB", (20, 20)), "PNG")
    order = []
    monkeypatch.setattr(reading, "WAITING_REQUESTS", 50)
    many = [reader.read([small], "a") for _ in range(40)]
    for i, future in enumerate([*many, reader.read([small], "b")]):
        future.add_done_callback(lambda _, i=i: order.append(i))
    with pytest.raises(QueueFull, match="wait to be decoded"):
        many.extend(reader.read([small], "a") for _ in range(100))
    wait(many, 60)
    assert order.index(40) <= 20, "whoever came last, with one image, was not kept waiting by forty requests"


def test_what_waits_when_it_is_closed_fails():
    reader = PictureReader(LIMITS, request_bytes=2**20, processes=1)
    waiting = [reader.read([encoded(Image.new("RGB", (20, 20)), "PNG")]) for _ in range(20)]
    reader.close()
    assert sum(isinstance(each.exception(1), EngineError) for each in waiting) > 10
    with pytest.raises(EngineError, match="shutting down"):
        reader.read([b""])


@pytest.mark.long
def test_two_thousand_hostile_images_and_a_process_of_little_memory():
    limits = replace(LIMITS, max_image_pixels=2**22, max_request_pixels=2**22)
    reader = PictureReader(limits, request_bytes=2**24, processes=1)
    reader.read([encoded(Image.new("L", (2, 2)), "PNG")]).result(60)
    most, died = 0, 0
    pids = set()
    for seed in range(2_000):
        for source in (image(seed), text(seed)):
            future = reader.read([source])
            error = future.exception(60)
            assert error is None or isinstance(error, RequestError), seed
            died += "more memory" in str(error)
        process = reader._children[0]._process
        if process is not None and process.poll() is None:
            pids.add(process.pid)
            with open(f"/proc/{process.pid}/status") as status:
                most = max(most, *(int(line.split()[1]) for line in status if line.startswith("VmHWM")))
    print(f"{most // 1024} MiB at most, {len(pids)} processes, {died} refused for want of memory")
    assert most < 200 * 1024
    assert let_go(reader) == 0
    reader.close()
