"""``rootcellar trace``: what servers did lately as one timeline, on which a request has the same name on each."""

import argparse
import json
import os
import sys
from typing import Any

import httpx

from rootcellar.errors import RequestError

_PROCESSES = 10
"""Process numbers of a server's trace, at most."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("urls", nargs="+", metavar="URL", help="of a server, as http://127.0.0.1:30000")
    parser.add_argument("--limit", type=int, default=256, help="newest requests of each (default 256)")
    parser.add_argument("--api-key", default=os.environ.get("ROOTCELLAR_API_KEY"), help="or ROOTCELLAR_API_KEY")


def run(args: argparse.Namespace) -> int:
    """Write the timeline to stdout, in Chrome's format, for https://ui.perfetto.dev."""
    traces = [_fetched(url.rstrip("/"), args.limit, args.api_key) for url in args.urls]
    json.dump(joined(dict(zip(args.urls, traces, strict=True))), sys.stdout)
    return 0


def _fetched(url: str, limit: int, key: str | None) -> dict[str, Any]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        answer = httpx.get(f"{url}/trace", params={"limit": limit}, headers=headers, timeout=30)
        answer.raise_for_status()
        found = answer.json()
        found["traceEvents"], found["otherData"]["started_at"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{url}/trace gives no timeline: {error}") from None
    return dict(found)


def joined(traces: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Traces of several servers as one, by what each is called: on one clock, as far as theirs agree.

    Slices of a request on several servers are tied by an arrow, from where it came first.
    """
    start = min(trace["otherData"]["started_at"] for trace in traces.values())
    events: list[dict[str, Any]] = []
    seen: dict[str, list[dict[str, Any]]] = {}
    for i, (name, trace) in enumerate(traces.items()):
        later = round((trace["otherData"]["started_at"] - start) * 1e6)
        for event in trace["traceEvents"]:
            moved = {**event, "pid": event["pid"] + i * _PROCESSES}
            if "ts" in event:
                moved["ts"] += later
            if event["name"] == "process_name":
                moved["args"] = {"name": f"{name}: {event['args']['name']}"}
            if event.get("cat") == "request" and event["name"] == event["args"].get("rid"):
                seen.setdefault(event["name"], []).append(moved)
            events.append(moved)
    for rid, slices in seen.items():
        first, *others = sorted(slices, key=lambda each: int(each["ts"]))
        for other in others:
            if other["pid"] != first["pid"]:
                tie = {"name": "apart", "cat": "request", "id": f"{rid} {other['pid']}"}
                events.append({**tie, "ph": "s", **_where(first)})
                events.append({**tie, "ph": "f", "bp": "e", **_where(other)})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"started_at": start}}


def _where(event: dict[str, Any]) -> dict[str, int]:
    return {name: event[name] for name in ("pid", "tid", "ts")}
