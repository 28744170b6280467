"""The page at ``/`` in a real browser: it moves, it shows who shares what, it is readable, it complains of nothing."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from observed import serving

import rootcellar
from rootcellar.server.observe.feed import INTERVAL
from seeing import image_file, make_seeing

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,1700"""
PATIENCE = 30.0

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def engine() -> Iterator[rootcellar.Engine]:
    with rootcellar.Engine(model_path="demo", max_total_tokens=2048, max_running_requests=4) as engine:
        yield engine
        engine.check()


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium, of requirements/lock.txt")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    driver.set_page_load_timeout(PATIENCE)
    yield driver
    driver.quit()


class Page:
    """What the tests do with the page, in their words."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url
        driver.get(url)

    def run(self, script: str, *args: Any) -> Any:
        return self.driver.execute_script(script, *args)

    def text(self, element_id: str) -> str:
        return self.run("return document.getElementById(arguments[0]).textContent.trim()", element_id)

    def wait(self, what: Callable[[], Any], message: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := what():
                return found
            time.sleep(0.1)
        self.driver.save_screenshot("/tmp/rootcellar-page.png")
        pytest.fail(f"{message}; see /tmp/rootcellar-page.png")

    def live(self) -> None:
        self.wait(lambda: self.text("status") == "live", "the page is not live")

    def ask(self, question: str) -> str:
        """Ask in the chat by keyboard, as people do; the line below the answer."""
        before = self.run("return document.querySelectorAll('.turn').length")
        box = self.driver.find_element("id", "question")
        box.send_keys(question)
        box.send_keys("\ue007")  # Enter
        self.wait(lambda: self.run("return document.querySelectorAll('.turn').length") > before, "no answer came")
        return self.run("return [...document.querySelectorAll('.turn')].at(-1).textContent")

    def nodes(self) -> list[dict]:
        """The blocks of the tree: id, how many share it, and where it is drawn."""
        return self.run(
            "return [...document.querySelectorAll('#tree g[data-node]')].map((g) => {"
            "const r = g.querySelector('rect').getBoundingClientRect();"
            "return {id: g.dataset.node, sharers: Number(g.dataset.sharers), left: r.left, width: r.width,"
            "height: r.height}})"
        )

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]


@pytest.fixture
def page(driver, engine) -> Iterator[Page]:
    with serving(engine) as url:
        page = Page(driver, url)
        page.live()
        yield page
        assert page.complaints() == []
        driver.get("about:blank")


def test_what_goes_between_nodes_is_shown_as_bytes_a_second(page):
    assert page.run("return document.getElementById('transfer-tile').hidden"), "this server is no part of two"
    script = """const done = arguments[arguments.length - 1];
    const reading = (at, bytes, seconds) => ({at, latency: {first_token: {count: 1, sum: 1}}, stats: {
      occupancy: {DEVICE: {used: 0, busy: 0}}, copies: bytes === null ? {} : {"peer-host": {bytes, seconds}}}});
    import("/page/history.js").then(({recall, rates}) => done(arguments[0].map((readings) => {
        recall(readings.map((each) => reading(...each))); return rates().transfer ?? null; })));"""
    cases = [[[1, None]], [[1, 0, 0]], [[1, 5e9, 5], [99, 9e9, 7], [100, 13e9, 8]], [[1, 6e9, 3], [100, 6e9, 3]]]
    assert page.driver.execute_async_script(script, cases) == [None, None, pytest.approx(8e9 / 3), 2e9]


def test_numbers_move_while_requests_run(page):
    done = threading.Event()

    def work() -> None:
        body = {"prompt": "What is a page?", "max_tokens": 200, "ignore_eos": True}
        while not done.is_set():
            httpx.post(f"{page.url}/v1/completions", json=body, timeout=60)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        page.wait(lambda: page.text("running") not in ("–", "0"), "no request is shown running")
        page.wait(lambda: float(page.text("speed").rstrip("k") or 0) > 0, "no tokens are counted")
        page.wait(lambda: "generating" in page.text("requests"), "no request is listed with its stage")
        stages = page.run("return [...document.querySelectorAll('#stages .name')].map((e) => e.textContent)")
        assert stages == ["waiting", "prompt", "prompt (chunk)", "generating"]
        assert page.run(_UNEXPLAINED) == []
        before = page.run("return document.querySelector('#history path.line.device').getAttribute('d')")
        page.wait(
            lambda: page.run("return document.querySelector('#history path.line.device').getAttribute('d')") != before,
            "the history stands still",
        )
        page.wait(lambda: page.run(_COLOURS) >= 3, "the map shows no page in use")
        label = page.run("return document.querySelector('#memory canvas').getAttribute('aria-label')")
        assert re.fullmatch(r"Pages of full: \d+ % free, \d+ % cached, \d+ % shared, \d+ % own", label)
    finally:
        done.set()
        for worker in workers:
            worker.join()
    page.wait(lambda: page.text("running") == "0", "requests that ended are still shown running")


# Colours of the requests' bars of tokens that the legend above them does not have.
_UNEXPLAINED = """
const colours = (query) => [...document.querySelectorAll(query)].map((e) => getComputedStyle(e).backgroundColor);
const explained = new Set(colours('#tokens-legend .swatch'));
return colours('#requests .bar, #requests .bar i').filter((colour) => !explained.has(colour));
"""
# How many colours the map of the memory has: free, cached, and what is in use.
_COLOURS = """
const canvas = document.querySelector('#memory canvas');
if (!canvas) return 0;
const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', {willReadFrequently: true});
copy.drawImage(canvas, 0, 0);
const pixels = copy.getImageData(0, 0, canvas.width, canvas.height).data;
const seen = new Set();
for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] == 255) seen.add(pixels.slice(i, i + 3).join());
return seen.size;
"""


def test_a_page_that_is_opened_later_shows_the_minutes_before(page, engine):
    engine.flush_cache()
    prompt = engine.encode("The quick brown fox jumps over the lazy dog. " * 8)
    for _ in range(2):
        engine.generate(input_ids=prompt, sampling_params={"max_new_tokens": 4, "ignore_eos": True})
    time.sleep(3 * INTERVAL)  # the past is a past: several readings go by
    page.driver.refresh()
    page.live()
    # At once, and not after as long again: a line of more than one reading, and a hit rate that only the past has.
    assert page.run("return document.querySelector('#history path.line.hit')?.getAttribute('d').split('L').length") > 2
    assert (
        page.run("return document.querySelector('#history path.line.device').getAttribute('d').split('L').length") > 3
    )
    assert page.text("hit-rate") != "–"


def _forked(nodes: list[dict]) -> dict | None:
    """The block that three requests share, when at least two smaller ones are drawn to the right of it."""
    for node in nodes:
        right = [n for n in nodes if n["left"] >= node["left"] + node["width"] - 1]
        if node["sharers"] >= 3 and len(right) >= 2 and all(n["height"] < node["height"] for n in right):
            return node
    return None


def test_two_chats_share_the_system_message_and_the_tree_shows_it(page, engine):
    engine.flush_cache()
    first = page.ask("What is a KV cache?")
    assert first.startswith("0 of ")
    second = page.ask("Why is it paged?")
    assert int(second.split(" of ")[0]) > 40  # the first turn was cached
    page.driver.find_element("id", "new-chat").click()
    other = page.ask("What is eviction?")
    shared = int(other.split(" of ")[0])
    assert shared >= 48  # whole pages of the system message
    node = page.wait(lambda: _forked(page.nodes()), "the tree does not show what the chats share")
    drawn = next(n for n in engine.sight.tree()["nodes"] if str(n["id"]) == node["id"])
    assert (drawn["start"], drawn["length"]) == (0, shared)
    page.driver.find_element("css selector", f'#tree g[data-node="{node["id"]}"]').click()
    panel = page.wait(lambda: page.text("node"), "choosing a block says nothing")
    for turn in ("chat 1, turn 1 · ended", "chat 1, turn 2", "chat 2, turn 1"):
        assert turn in panel
    # Its words are at its top, where people read, however many continue it below.
    block, label = page.run(
        "const g = document.querySelector(`#tree g[data-node='${arguments[0]}']`);"
        "return ['rect', 'text'].map((part) => g.querySelector(part).getBoundingClientRect().toJSON())",
        node["id"],
    )
    assert block["top"] <= label["top"] <= label["bottom"] <= block["top"] + 22 < block["bottom"]
    assert "You are the keeper of a root cellar" in panel


def test_the_report_shows_what_was_computed_again_and_why(page, engine):
    engine.flush_cache()
    rest = (
        "Apples lie to the left, potatoes to the right, and the carrots are in sand at the end of the longest shelf. "
    )
    for day in ("Monday the 3rd", "Tuesday the 4th"):
        messages = [{"role": "system", "content": f"You keep a cellar. Today is {day}. {rest * 2}"}]
        body = {"messages": [*messages, {"role": "user", "content": "Where are the apples?"}], "max_tokens": 2}
        httpx.post(f"{page.url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
    rows = "return [...document.querySelectorAll('#report tr')].map((r) => [...r.cells].map((c) => c.textContent))"

    def found() -> list[str] | None:
        return next((row for row in page.run(rows) if row[0] == "changing value" and "Tuesday" in row[4]), None)

    row = page.wait(found, "the report does not show a date in the system message")
    assert int(row[1]) >= 1
    assert float(row[2].rstrip("k")) > 32
    assert "Today is" in row[4]
    assert "tokens of" in page.text("report-text")


def test_the_tree_is_walked_by_keyboard(page, engine):
    engine.flush_cache()
    start = engine.encode("The quick brown fox jumps over the lazy dog, and the dog did not mind it at all. " * 2)
    for tail in ("What is a page?" * 8, "What is a tier?" * 8):
        engine.generate(input_ids=start + engine.encode(tail), sampling_params={"max_new_tokens": 1})
    page.wait(lambda: len(page.nodes()) == 3, "the tree is not drawn")
    page.run("document.querySelector('#tree g[tabindex=\"0\"]').focus()")
    keys = page.driver.switch_to.active_element
    keys.send_keys("\ue014")  # right: to the first child
    child = page.run("return document.activeElement.dataset.node")
    page.driver.switch_to.active_element.send_keys("\ue015")  # down: to its sibling
    sibling = page.run("return document.activeElement.dataset.node")
    assert len({child, sibling, None}) == 3
    page.driver.switch_to.active_element.send_keys("\ue007")
    assert "held: full device" in page.text("node")
    assert page.run("return document.activeElement.getAttribute('aria-pressed')") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_is_readable(page, scheme):
    page.ask("What is a prefix?")
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    try:
        page.wait(lambda: page.run("return innerWidth") == 390, "the window did not become narrow")
        page.wait(lambda: page.run(_TOO_WIDE) == [], "something is wider than the window")
        assert page.run(_TOO_SMALL) == []
        assert page.run(_COVERED) == []
        assert page.run(_FAINT) == []
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# What sticks out of the window, unless it scrolls by itself.
_TOO_WIDE = """
const out = [];
if (document.documentElement.scrollWidth > innerWidth) out.push('the page itself');
for (const e of document.querySelectorAll('main *')) {
  const r = e.getBoundingClientRect();
  if (r.width && (r.right > innerWidth + 1 || r.left < -1) && !e.closest('.scroll')) out.push(e.outerHTML.slice(0, 80));
}
return out;
"""
# Text of less than 11 pixels, and buttons too small for a thumb.
_TOO_SMALL = """
const out = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  const size = parseFloat(getComputedStyle(e).fontSize);
  if (own && e.getClientRects().length && size < 11) out.push(e.outerHTML.slice(0, 80));
}
for (const e of document.querySelectorAll('main button:not([hidden]):not(.sharers *)')) {
  if (e.getBoundingClientRect().height < 36) out.push(e.outerHTML.slice(0, 80));
}
return out;
"""
# Numbers of the requests' table under a scrollbar, which lies over the table where fingers scroll: 10 pixels of it.
_COVERED = """
const rows = document.querySelector('#requests').closest('.scroll');
const edge = rows.getBoundingClientRect().left + rows.clientLeft + rows.clientWidth - 10;
return [...rows.querySelectorAll('.number')].filter((cell) => {
  const words = document.createRange();
  words.selectNodeContents(cell);
  return words.getBoundingClientRect().right > edge;
}).map((cell) => cell.outerHTML);
"""
# Text whose contrast with what is behind it is less than WCAG's 4.5 to 1.
_FAINT = """
const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => {
  const [R, G, B] = [r, g, b].map((v) => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * R + 0.7152 * G + 0.0722 * B;
};
const out = [];
for (const e of document.querySelectorAll('body *:not(svg *):not(script):not(noscript)')) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !e.getClientRects().length) continue;
  let behind = e;
  while (behind && (rgb(getComputedStyle(behind).backgroundColor)[3] ?? 1) < 1) behind = behind.parentElement;
  const back = behind ? rgb(getComputedStyle(behind).backgroundColor) : [255, 255, 255];
  const [a, b] = [light(rgb(getComputedStyle(e).color)), light(back)].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) out.push(`${((a + 0.05) / (b + 0.05)).toFixed(2)} ${e.outerHTML.slice(0, 80)}`);
}
return out;
"""


def test_everything_has_a_name_for_those_who_do_not_see_it(page):
    page.ask("What is a prefix?")
    page.wait(page.nodes, "the tree is not drawn")
    nameless = page.run("""
        const all = document.querySelectorAll('button, input, textarea, [role], canvas, svg, a, section');
        return [...all].filter((e) => {
          const labelled = (e.getAttribute('aria-labelledby') ?? '').split(' ')
            .some((id) => id && document.getElementById(id)?.textContent.trim());
          return !(labelled || e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length);
        }).map((e) => e.outerHTML.slice(0, 90))""")
    assert nameless == []
    assert page.run("return document.documentElement.lang") == "en"


def test_a_server_with_a_key_is_asked_for_it_once(driver, engine):
    with serving(engine, api_key="let me in") as url:
        page = Page(driver, url)
        page.wait(lambda: page.run("return document.getElementById('key-dialog').open"), "the key is not asked for")
        assert page.text("status") == "needs a key"
        driver.find_element("id", "key").send_keys("wrong\ue007")
        page.wait(lambda: "needs" in page.text("key-reason"), "a wrong key is not refused")
        page.wait(lambda: page.run("return document.getElementById('key-dialog').open"), "the key is not asked again")
        driver.find_element("id", "key").send_keys("let me in\ue007")
        page.live()
        assert " of " in page.ask("What is a page?")
        driver.refresh()
        page.live()  # it is kept while the tab lives
        assert page.run("return JSON.stringify(localStorage)") == "{}"
        # The browser itself notes each 401; nothing else is wrong.
        assert all("401" in complaint for complaint in page.complaints())
        driver.get("about:blank")


def test_an_error_of_the_server_is_shown_in_the_chat_and_the_chat_goes_on(page):
    page.run("document.getElementById('system').value = 'long '.repeat(9000)")
    box = page.driver.find_element("id", "question")
    box.send_keys("Hello\ue007")
    message = page.wait(
        lambda: page.run("return document.querySelector('.message.error')?.textContent"), "the error is not shown"
    )
    assert re.search(r"\d+ (tokens|characters)", message)
    page.run("document.getElementById('system').value = ''")
    assert " of " in page.ask("What is a page?")
    refused = page.complaints()  # the browser notes the 400
    assert len(refused) == 1
    assert "400" in refused[0]


def test_the_trace_is_saved_as_a_file(page, tmp_path):
    page.driver.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    page.ask("What is a page?")
    page.driver.find_element("id", "save-trace").click()
    (file,) = page.wait(lambda: list(tmp_path.glob("*.json")), "no file was saved")
    assert json.loads(file.read_text())["traceEvents"]


def test_a_picture_is_shown_and_the_tree_marks_it(driver, tmp_path_factory):
    folder = make_seeing(tmp_path_factory.mktemp("seeing"))
    file = folder / "cellar.png"
    file.write_bytes(image_file())
    with (
        rootcellar.Engine(model_path=folder, max_total_tokens=1024, page_size=4, mm_cache_size=8) as engine,
        serving(engine) as url,
    ):
        page = Page(driver, url)
        page.live()
        page.wait(lambda: not page.run("return document.getElementById('add-image').hidden"), "no image is asked for")
        page.run("document.getElementById('system').value = ''")  # else the image is beyond what is told of a block
        page.driver.find_element("id", "image").send_keys(str(file))
        page.wait(lambda: page.run("return document.querySelectorAll('#shown img').length"), "the image is not shown")
        page.ask("What is it?")
        assert page.run("return document.querySelectorAll('.message.user img').length") == 1
        page.wait(lambda: page.run("return document.querySelectorAll('#tree rect.image').length"), "no image is marked")
        assert "striped: an image" in page.text("tree-legend")
        assert engine.stats()["encoder"]["encoded"] == 1
        assert page.complaints() == []
        driver.get("about:blank")
