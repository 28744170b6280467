"""The routes that show what goes on: the tree, the trace, the live feed, the page's files; who may see them."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time

import httpx
import pytest
from observed import serving

import rootcellar
from rootcellar.errors import EngineError
from rootcellar.server.app import create_app
from rootcellar.server.observe import feed as feed_module
from rootcellar.server.observe.feed import Feed
from rootcellar.server_config import ServerConfig
from slowly import slowly

GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
SHARED = list(range(100, 148))


@pytest.fixture(scope="module")
def engine(tiny_folder):
    with rootcellar.Engine(model_path=tiny_folder, max_total_tokens=1024, max_running_requests=4) as engine:
        yield engine
        engine.check()


@pytest.fixture
def get(engine):
    """``get(path, key)`` of a server without or with keys."""

    def get(path, key=None, **options) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(create_app(engine, ServerConfig(**options)))
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
                return await client.get(path)

        return asyncio.run(ask())

    return get


# -- the tree ---------------------------------------------------------------------------------------------------------


def test_the_tree_says_who_shares_a_node(engine, get):
    for rid, tail in (("one", 200), ("two", 300)):
        engine.generate(input_ids=[*SHARED, *range(tail, tail + 20)], sampling_params=GREEDY, rid=rid)
    tree = get("/cache/tree").json()
    ways = {r["rid"]: r["nodes"] for r in tree["requests"] if r["rid"] in ("one", "two")}
    (shared,) = set(ways["one"]) & set(ways["two"])
    node = next(n for n in tree["nodes"] if n["id"] == shared)
    assert (node["start"], node["length"], node["children"]) == (0, 48, 2)
    assert node["held"] == {"full": {"DEVICE": 48}}
    assert node["head"] == SHARED[:32]
    assert node["text"] == engine._parts.tokenizer.decode(SHARED[:32], skip_special_tokens=False)
    assert 0 <= node["idle"] <= node["age"] < 60
    assert not node["in_use"]


def test_the_tree_says_what_is_in_use_while_a_request_runs(engine):
    params = {**GREEDY, "max_new_tokens": 500}
    with slowly(engine):
        stream = engine.generate(input_ids=SHARED, sampling_params=params, stream=True, rid="running")
        next(stream)
        next(stream)  # its second token: it decodes
        tree = engine.sight.tree()
        (memory,) = engine.sight.memory_map()
        stream.close()
    assert tree["nodes"][0]["in_use"]
    running = next(r for r in tree["requests"] if r["rid"] == "running")
    assert running["stage"] == "DECODE_LOOP"
    assert tree["nodes"][0]["id"] in running["nodes"]
    assert memory["pages"] == len(memory["cells"]) == 64
    assert {"2", "3"} <= set(memory["cells"])
    (memory,) = engine.sight.memory_map()
    assert set(memory["cells"]) == {"0", "1"}
    shelf = engine.stats()["cache"]["full"]["DEVICE"]
    assert memory["cells"].count("0") * 16 == shelf["free"]


def test_the_tree_is_bounded(get):
    assert len(get("/cache/tree?limit=1").json()["nodes"]) == 1
    assert get("/cache/tree?limit=1").json()["total"] > 1
    for wrong in ("0", "2001", "x"):
        assert get(f"/cache/tree?limit={wrong}").status_code == 400


def test_a_map_of_more_pages_than_cells_says_what_most_of_them_are(engine):
    (whole,), (coarse,) = engine.sight.memory_map(), engine.sight.memory_map(cells=10)
    assert coarse["pages_per_cell"] == 7
    assert len(coarse["cells"]) == 10
    first = whole["cells"][:7]
    assert coarse["cells"][0] == max("3210", key=lambda c: (first.count(c), c))


# -- the trace --------------------------------------------------------------------------------------------------------


def slices(trace, pid):
    return [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == pid]


def test_a_trace_has_each_stage_inside_its_request(engine, get):
    engine.generate(input_ids=list(range(3, 200)), sampling_params=GREEDY, rid="traced")
    trace = get("/trace").json()
    (whole,) = [e for e in slices(trace, 1) if e["name"] == "traced"]
    assert whole["args"] == {
        "rid": "traced", "prompt_tokens": 197, "cached_tokens": 0, "completion_tokens": 4, "retractions": 0,
        "finish": "length",
    }  # fmt: skip
    stages = [e for e in slices(trace, 1) if e["args"].get("rid") == "traced" and e is not whole]
    assert [s["name"] for s in stages] == ["TOKENIZE", "PREFILL_WAITING", "PREFILL_FORWARD", "DECODE_LOOP"]
    assert stages[0]["ts"] == whole["ts"]
    assert stages[-1]["ts"] + stages[-1]["dur"] == whole["ts"] + whole["dur"]
    for one, after in itertools.pairwise(stages):
        assert one["ts"] + one["dur"] == after["ts"]
        assert one["tid"] == after["tid"] == whole["tid"]


def test_requests_that_overlap_have_lanes_of_their_own(engine, get):
    engine.generate(input_ids=[SHARED, SHARED, SHARED], sampling_params=GREEDY)
    lanes: dict[int, list] = {}
    for event in slices(get("/trace").json(), 1):
        if event["name"] == event["args"]["rid"]:
            lanes.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(lanes) >= 3
    for spans in lanes.values():
        for (_, end), (begin, _) in itertools.pairwise(sorted(spans)):
            assert end <= begin


def test_a_trace_has_the_device_s_part_of_each_step(engine, get):
    """Which may have begun while the host took what the step before gave, and ends in its own."""
    engine.generate(input_ids=SHARED, sampling_params=GREEDY)
    trace = get("/trace?limit=1").json()
    steps, device = ([e for e in slices(trace, 2) if e["tid"] == lane] for lane in (1, 2))
    for lane in (steps, device):
        assert [s["name"] for s in lane] == ["prefill", "decode", "decode", "decode"]
    assert [s["args"]["tokens"] for s in steps] == [len(SHARED) - 32, 1, 1, 1]
    assert steps[0]["ts"] <= device[0]["ts"]
    for step, part in zip(steps, device, strict=True):
        assert step["ts"] <= part["ts"] + part["dur"] <= step["ts"] + step["dur"]
    for lane in (steps, device):
        for one, after in itertools.pairwise(lane):
            assert one["ts"] + one["dur"] <= after["ts"]


# -- the feed ---------------------------------------------------------------------------------------------------------


def test_the_feed_moves_while_requests_run_and_ends_with_the_server(engine):
    seen = []
    with serving(engine) as url, httpx.stream("GET", f"{url}/feed", timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()
        for line in lines:
            if line.startswith("event: "):
                name = line[7:]
                seen.append((name, json.loads(next(lines).removeprefix("data: "))))
                if name == "cache":
                    engine.generate(input_ids=SHARED, sampling_params=GREEDY)
            if len([n for n, _ in seen if n == "numbers"]) == 3:
                break
    numbers = [data for name, data in seen if name == "numbers"]
    assert numbers[-1]["stats"]["generated_tokens"] - numbers[0]["stats"]["generated_tokens"] == 4
    assert numbers[-1]["at"] > numbers[0]["at"]
    look = next(data for name, data in seen if name == "cache")
    assert look["tree"]["nodes"]
    assert look["memory"][0]["pool"] == "full"


class Pace:
    """A sight whose looks take as much of the engine's time as one wants, and that counts them."""

    def __init__(self, seconds=0.0):
        self.seconds, self.looks = seconds, 0

    def history(self, tenant=None):
        return [{"at": 0.5, "of": tenant}]

    def look(self, limit, tenant=None):
        self.looks += 1
        return {"tree": {"nodes": [], "limit": limit}, "memory": [], "seconds": self.seconds}


def pretend_feed(monkeypatch, sight, interval=0.01, read=None, **options) -> Feed:
    monkeypatch.setattr(feed_module, "INTERVAL", interval)
    monkeypatch.setattr(feed_module, "numbers", lambda reading, model: {"number": reading})
    counter = itertools.count()

    async def count():
        return next(counter)

    return Feed(sight, read or count, "m", **options)


def test_a_slow_watcher_gets_the_newest_and_no_backlog(monkeypatch):
    async def main() -> list[bytes]:
        readings = 0

        async def read():
            nonlocal readings
            readings += 1
            return readings

        feed = pretend_feed(monkeypatch, Pace(), read=read)
        watcher = feed.watch()
        got = [await anext(watcher), await anext(watcher)]
        while readings < 8:
            await asyncio.sleep(0.01)
        got.append(await anext(watcher))
        await feed.close()
        assert len([event async for event in watcher]) <= 1  # and then it ends
        return got

    _, _, late = asyncio.run(main())
    assert late.count(b"event: numbers") == 1
    assert int(re.search(rb'"number":(\d+)', late)[1]) > 3


def test_a_watcher_first_gets_the_minutes_before_and_each_key_its_own(monkeypatch):
    async def main(tenant) -> bytes:
        feed = pretend_feed(monkeypatch, Pace(), tenant=tenant)
        watcher = feed.watch()
        first = await anext(watcher)
        await feed.close()
        await watcher.aclose()
        return first

    assert asyncio.run(main(None)) == b'retry: 2000\n\nevent: history\ndata: [{"at":0.5,"of":null}]\n\n'
    assert b'"of":"alice"' in asyncio.run(main("alice"))


def test_a_watcher_of_an_engine_that_is_gone_still_gets_the_trouble(monkeypatch):
    def gone(*_):
        raise EngineError("the engine was shut down")

    async def main() -> bytes:
        feed = pretend_feed(monkeypatch, Pace(), read=gone)
        monkeypatch.setattr(feed._sight, "history", gone)
        watcher = feed.watch()
        got = await anext(watcher) + await anext(watcher)
        await feed.close()
        return got

    assert asyncio.run(main()) == (b'retry: 2000\n\nevent: trouble\ndata: {"message":"the engine was shut down"}\n\n')


def test_looking_takes_a_small_part_of_the_engines_time(monkeypatch):
    async def main() -> int:
        sight = Pace(0.05)
        feed = pretend_feed(monkeypatch, sight)
        watcher = feed.watch()
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            await anext(watcher)
        await feed.close()
        return sight.looks

    assert asyncio.run(main()) == 1  # the next may come after 100 times as long


def test_nobody_is_read_for_when_nobody_watches(monkeypatch):
    async def main() -> tuple[int, int]:
        sight = Pace()
        feed = pretend_feed(monkeypatch, sight)
        watcher = feed.watch()
        await anext(watcher)
        await anext(watcher)
        await watcher.aclose()
        await asyncio.sleep(0.1)
        return len([t for t in asyncio.all_tasks() if not t.done()]), feed._watchers

    assert asyncio.run(main()) == (1, 0)


def test_trouble_is_told_and_the_feed_goes_on(monkeypatch):
    async def main() -> bytes:
        readings = itertools.count()

        async def read():
            if next(readings) == 0:
                raise EngineError("the engine was shut down")
            return 1

        feed = pretend_feed(monkeypatch, Pace(), read=read)
        watcher = feed.watch()
        got = b""
        while b"numbers" not in got:
            got += await anext(watcher)
        await feed.close()
        return got

    assert b'event: trouble\ndata: {"message":"the engine was shut down"}' in asyncio.run(main())


def test_too_many_watchers_are_refused(engine):
    async def main() -> httpx.Response:
        app = create_app(engine, ServerConfig())
        app.state.server.observer._feed(None)._max_watchers = 0
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get("/feed")

    response = asyncio.run(main())
    assert response.status_code == 503
    assert response.headers["retry-after"] == "10"


# -- the page's files, and keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "files"), [("/", 8), ("/docs", 4)])
def test_the_page_brings_all_it_needs(get, path, files):
    page = get(path)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in page.headers["content-security-policy"]
    wanted = set(re.findall(r'(?:src|href)="(/page/[^"]+)"', page.text))
    seen = set()
    while wanted - seen:
        path = min(wanted - seen)
        seen.add(path)
        file = get(path)
        assert file.status_code == 200, path
        wanted |= {f"/page/{name}" for name in re.findall(r'from "\./([^"]+)"', file.text)}
        assert not re.search(r"""(src=|url\(|import |from )["']?https?:""", file.text), path
    assert len(seen) > files
    assert "style=" not in page.text  # the content security policy would drop it
    assert get("/page/secret.txt").status_code in (401, 404)


@pytest.mark.parametrize(
    ("path", "nobody", "user", "admin"),
    [("/", 200, 200, 200), ("/page/main.js", 200, 200, 200), ("/metrics", 401, 200, 200),
     ("/cache/tree", 401, 401, 200), ("/trace", 401, 401, 200), ("/feed", 401, 401, None)],
)  # fmt: skip
def test_keys(get, path, nobody, user, admin):
    keys = {"api_key": "user", "admin_api_key": "admin"}
    assert get(path, **keys).status_code == nobody
    assert get(path, "user", **keys).status_code == user
    if admin is not None:  # the feed has no end
        assert get(path, "admin", **keys).status_code == admin


def test_one_key_opens_everything(get):
    assert get("/cache/tree", "k", api_key="k").status_code == 200
    assert get("/cache/tree", api_key="k").status_code == 401
