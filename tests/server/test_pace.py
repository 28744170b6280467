"""Turns on the event loop, with a clock that the tests hold."""

import asyncio
import itertools

import pytest

from rootcellar.server.pace import Pace, at_the_pace_of, paced


class Time:
    """Seconds that pass, and those of them in which the loop's thread worked; sleeping takes as long as it says."""

    def __init__(self):
        self.now = self.worked = 100.0

    def work(self, seconds):
        self.now += seconds
        self.worked += seconds

    async def sleep(self, seconds):
        self.now += seconds
        await asyncio.sleep(0)


async def busy(time):
    """A request that keeps the loop for a second, in ten pieces."""
    for _ in range(10):
        time.work(0.1)
        await asyncio.sleep(0)


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def pace(time):
    return Pace(clock=lambda: time.now, spent=lambda: time.worked, sleep=time.sleep)


def test_whoever_kept_the_loop_busy_waits_as_long(pace, time):
    """Ten pieces of work of one tenant: half of the time that passes is others'."""

    async def main():
        pace.account("victim")
        began = time.now
        await at_the_pace_of(pace.account("hostile"), busy(time))
        return time.now - began

    took = asyncio.run(main())
    assert took == pytest.approx(2.0, abs=0.11)


def test_many_requests_of_a_tenant_wait_in_one_line(pace, time):
    """However many there are, each piece of work is followed by as long a rest."""
    at = []

    async def request():
        at.append(time.now)
        time.work(0.1)

    async def main():
        account = pace.account("hostile")
        pace.account("victim")
        await asyncio.gather(*(at_the_pace_of(account, request()) for _ in range(8)))

    asyncio.run(main())
    assert all(later - earlier >= 0.19 for earlier, later in itertools.pairwise(at[1:])), at


def test_alone_nobody_waits(pace, time):
    async def main():
        pace.account("gone")
        time.now += 60
        began = time.now
        await at_the_pace_of(pace.account("only"), busy(time))
        return time.now - began

    assert asyncio.run(main()) == pytest.approx(1.0)


def test_waiting_for_others_costs_nothing(pace, time):
    async def request():
        for _ in range(10):
            time.now += 1.0  # the thread did something else meanwhile
            await asyncio.sleep(0)

    async def main():
        pace.account("victim")
        account = pace.account("patient")
        await at_the_pace_of(account, request())
        return account.owed()

    assert asyncio.run(main()) == 0.0


def test_results_errors_and_cancellation_pass_through(pace):
    seen = []

    async def request(how):
        try:
            assert await paced(asyncio.sleep(0, "inner")) == "inner"
            if how == "raise":
                raise ValueError("no")
            if how == "wait":
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        return how

    async def main():
        account = pace.account("a")
        pace.account("b")
        assert await at_the_pace_of(account, request("done")) == "done"
        with pytest.raises(ValueError, match="no"):
            await at_the_pace_of(account, request("raise"))

        async def all_of_it():
            await at_the_pace_of(account, request("wait"))

        task = asyncio.create_task(all_of_it())
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert seen == ["cancelled"]


def test_accounts_do_not_grow_without_end(pace):
    for i in range(5000):
        pace.account(f"t{i}")
    assert len(pace._accounts) <= 1024
