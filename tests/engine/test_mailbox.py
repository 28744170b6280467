"""From the engine's thread into an event loop: what a reader of many outputs leaves to others."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rootcellar.engine import mailbox as mailboxes
from rootcellar.engine.mailbox import Mailbox, Post


def output(number: int, end: bool = False) -> Any:
    return SimpleNamespace(number=number, finish="length" if end else None)


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of its own that the loop's thread used, held by the test."""
    now = [0.0]
    monkeypatch.setattr(mailboxes, "time", SimpleNamespace(thread_time=lambda: now[0], monotonic=time.monotonic))
    return now


@pytest.mark.parametrize(("each", "turns"), [(0.0, 0), (0.0004, 3), (0.01, 9)])
def test_a_reader_of_many_outputs_gives_others_their_turn(spent: list[float], each: float, turns: int) -> None:
    async def main() -> tuple[list[int], int]:
        box = Mailbox(Post(asyncio.get_running_loop()))
        for index in range(10):
            box.put(index, output(index, end=True))
        others, read = 0, []

        async def other() -> None:
            nonlocal others
            while True:
                await asyncio.sleep(0)
                others += 1

        beside = asyncio.create_task(other())
        async for index, _ in box.outputs(10):
            read.append(index)
            spent[0] += each
        seen = others
        beside.cancel()
        return read, seen

    read, seen = asyncio.run(main())
    assert read == list(range(10))
    assert abs(seen - turns) <= 1
    assert bool(seen) == bool(turns)


def test_the_newest_output_takes_the_place_of_those_before() -> None:
    async def main() -> list[tuple[int, int]]:
        box = Mailbox(Post(asyncio.get_running_loop()))
        for number, index in enumerate((1, 0, 1, 0, 1)):
            box.put(index, output(number, end=True))
        return [(index, cast(Any, each).number) async for index, each in box.outputs(2)]

    assert asyncio.run(main()) == [(1, 4), (0, 3)]


def test_a_reader_that_was_cancelled_takes_nothing_with_it() -> None:
    async def main() -> list[int]:
        box = Mailbox(Post(asyncio.get_running_loop()))
        outputs = box.outputs(1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await anext(outputs)
        box.put(0, output(0, end=True))
        return [cast(Any, each).number async for _, each in box.outputs(1)]

    assert asyncio.run(main()) == [0]
