"""Azure's traces, which have lengths and no ids: which request continues which is guessed from those.

A row of AzureLLMInferenceTrace (2023, 2024) has a time, the tokens of a prompt and those of its answer. The next prompt
of a conversation is the last one, its answer, and a message: so a request is taken to go on with the newest earlier one
to whose prompt and answer it adds from one to ``most`` tokens. Whether that is so nobody can tell: hits that come of it
are an estimate, and one from above where conversations are many.
"""

from __future__ import annotations

import csv
import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable
from datetime import datetime

from rootcellar.sim.trace import BLOCK, BadLine, TraceRequest, token_count

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MESSAGE = 256
"""Most tokens that a message adds."""


def parse_csv(
    lines: Iterable[str], block: int = BLOCK, most: int = MESSAGE
) -> tuple[list[TraceRequest], list[BadLine]]:
    """Requests with made ids, in the order of their rows, and the rows that cannot be read; the first is line 2.

    Raises ``ValueError`` where the columns are not Azure's, or it is no CSV.
    """
    try:
        return _parse(csv.DictReader(lines), block, most)
    except csv.Error as error:
        raise ValueError(f"it is no CSV: {error}") from None


def _parse(rows: csv.DictReader[str], block: int, most: int) -> tuple[list[TraceRequest], list[BadLine]]:
    if rows.fieldnames is None or not set(COLUMNS) <= set(rows.fieldnames):
        raise ValueError(f"a CSV trace has the columns {', '.join(COLUMNS)}")
    fresh = itertools.count()
    requests: list[TraceRequest] = []
    bad: list[BadLine] = []
    ended: list[tuple[int, int, tuple[int, ...]]] = []  # (tokens in the end, its place, its blocks), by tokens
    for number, row in enumerate(rows, start=2):
        try:
            length = token_count("ContextTokens", int(row["ContextTokens"]), 1)
            output = token_count("GeneratedTokens", int(row["GeneratedTokens"]), 0)
            moment = 1e3 * datetime.fromisoformat(row["TIMESTAMP"].strip()[:26]).timestamp()
        except (ValueError, TypeError, AttributeError) as error:
            bad.append(BadLine(number, str(error)))
            continue
        low, high = bisect_left(ended, (length - most,)), bisect_left(ended, (length,))
        before: tuple[int, ...] = ()
        if low < high:
            newest = max(range(low, high), key=lambda i: ended[i][1])
            before = ended.pop(newest)[2]
        whole = before + tuple(itertools.islice(fresh, max(0, -(-(length + output) // block) - len(before))))
        prompt = whole[: length // block] + tuple(itertools.islice(fresh, int(length % block > 0)))
        rest = max(0, output - 1)
        answer = whole[length // block : -(-(length + rest) // block)] if rest else ()
        requests.append(TraceRequest(prompt, length, output, answer, moment))
        insort(ended, (length + output, number, whole[: (length + output) // block]))
    return requests, bad
