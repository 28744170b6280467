"""Work that is done once for all who ask."""

import asyncio

import pytest

from rootcellar.server.shared import Shared


def test_who_comes_just_as_the_work_ends_gets_its_result():
    """Between the end of the work and what asyncio calls then, others have their turn."""
    runs = 0

    async def main():
        gate = asyncio.Event()

        async def work():
            nonlocal runs
            runs += 1
            await gate.wait()
            return runs

        shared = Shared(work, seconds=60)

        async def ask(turns):
            for _ in range(turns):
                await asyncio.sleep(0)
            return await shared.result()

        asking = [asyncio.create_task(ask(turns)) for turns in range(12)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*asking)

    assert asyncio.run(main()) == [1] * 12
    assert runs == 1


def test_a_result_is_fresh_for_its_seconds_and_an_error_for_nobody_who_comes_later():
    answers = iter([ValueError("no"), 1, 2])

    async def work():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def main():
        kept = Shared(work, seconds=60.0)
        with pytest.raises(ValueError, match="no"):
            await kept.result()
        assert [await kept.result(), await kept.result()] == [1, 1]
        assert await Shared(work, seconds=0.0).result() == 2

    asyncio.run(main())
