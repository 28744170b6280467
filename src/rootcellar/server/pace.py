"""Turns on the event loop: no tenant's requests keep it from another's.

All requests are read, checked and written on one thread. Whoever kept it busy lately waits as long before it goes on,
while others are there: so however many requests one tenant sends, and however large, another finds the loop free at
least half of the time. What is counted is the thread's own time, so waiting for the engine costs nobody anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# Seconds without a request after which a tenant is not there.
_GONE = 2.0
# Seconds of the loop that are used before a tenant waits: about what one piece of a usual request takes.
_FREE = 0.001
# Seconds that are not worth sleeping for.
_LEAST = 1e-5
# Tenants that are remembered.
_MOST = 1024


class Pace:
    """Who used how much of one event loop."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        spent: Callable[[], float] = time.thread_time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        """``clock``: seconds that pass; ``spent``: seconds of its own that the loop's thread used; ``sleep``: waits."""
        self.clock = clock
        self.spent = spent
        self.sleep = sleep
        self._accounts: dict[str, Account] = {}

    def account(self, tenant: str) -> Account:
        """The account of ``tenant``, which is there now."""
        account = self._accounts.pop(tenant, None) or Account(self)
        account.seen = self.clock()
        self._accounts[tenant] = account  # the newest are last
        if len(self._accounts) > _MOST:
            del self._accounts[next(iter(self._accounts))]
        return account

    def others(self, account: Account) -> bool:
        """Whether anybody else is there."""
        since = self.clock() - _GONE
        for other in reversed(self._accounts.values()):
            if other.seen < since:
                return False
            if other is not account:
                return True
        return False


class Account:
    """What one tenant owes the others. ``seen``: when it last sent something; ``until``: when its debt is paid."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.seen = self.until = 0.0
        self._line = asyncio.Lock()

    def owed(self) -> float:
        """Seconds until its next request goes on."""
        owed = self.until - self.pace.clock() - _FREE
        return owed if owed > _LEAST and self.pace.others(self) else 0.0

    @property
    def free(self) -> bool:
        """Whether a request of its goes on now."""
        return not (self._line.locked() or self.owed())

    async def turn(self) -> None:
        """Wait until nothing is owed. One after the other: each that goes on may owe anew."""
        async with self._line:
            while owed := self.owed():
                await self.pace.sleep(owed)

    def spend(self, seconds: float) -> None:
        """Its requests used so much of the loop."""
        now = self.pace.clock()
        self.until = max(self.until, now) + seconds


_account: ContextVar[Account] = ContextVar("account")


def at_the_pace_of(account: Account, work: Coroutine[Any, Any, T]) -> Awaitable[T]:
    """``work`` on ``account``, and with it what it has done by :func:`paced`."""
    _account.set(account)
    return _Paced(account, work)


def paced(work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """``work``, for a task of its own, on the account of whoever asks for it."""

    async def pay() -> T:
        account = _account.get(None)
        return await (work if account is None else _Paced(account, work))

    return pay()


class _Paced(Generic[T]):
    """A coroutine that is gone on with only while nothing is owed, each piece of which is counted."""

    def __init__(self, account: Account, work: Coroutine[Any, Any, T]) -> None:
        self._account = account
        self._work = work

    def __await__(self) -> Generator[Any, None, T]:
        account, spent = self._account, self._account.pace.spent
        thrown: BaseException | None = None
        while True:
            if thrown is None and not account.free:
                try:
                    yield from account.turn().__await__()
                except BaseException as error:
                    thrown = error
            began = spent()
            try:
                # What is thrown, as when the client went away, is told at once: it makes less of the work.
                waits_for = self._work.send(None) if thrown is None else self._work.throw(thrown)
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                account.spend(spent() - began)
            thrown = None
            try:
                yield waits_for
            except BaseException as error:
                thrown = error
