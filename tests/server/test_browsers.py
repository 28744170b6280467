"""What web pages may do: foreign origins, foreign hosts, links and images, and those that were allowed."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.responses import Response
from test_access import ask, routes_of

from rootcellar.errors import ConfigError
from rootcellar.server.app import create_app
from rootcellar.server.browsers import Browsers, host_name, is_loopback
from rootcellar.server.callers import Access
from rootcellar.server_config import ServerConfig
from serving import on_thread

HERE = "127.0.0.1:30000"
EVIL = {"origin": "http://evil.example"}


@pytest.fixture
def entered(monkeypatch):
    """Routes answer 299 instead of doing anything."""

    async def enter(_route, scope, receive, send):
        await Response(status_code=299)(scope, receive, send)

    monkeypatch.setattr(APIRoute, "handle", enter)


def get_all(engine, headers, settings, methods=None):
    """Statuses of every route, by route and method."""
    app = create_app(engine, ServerConfig(**settings))
    raw = [(name.encode(), value.encode()) for name, value in ({"host": HERE} | headers).items()]

    async def walk():
        found = {}
        for route in routes_of(app):
            for method in methods or route.methods:
                path = route.path.replace("{model:path}", "demo")
                found[route.path, method, route.access] = await ask(app, method, path, raw, host=None)
        return found

    return asyncio.run(walk())


@pytest.mark.parametrize(
    "headers",
    [
        EVIL,
        {"origin": "null"},
        {"origin": f"http://{HERE}.evil.example"},
        {"origin": "http://127.0.0.1:30001"},
        {"origin": f"http://evil.example@{HERE}x"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"},
    ],
)
@pytest.mark.parametrize(
    "settings", [{}, {"host": "0.0.0.0"}, {"admin_api_key": "a"}, {"cors_allow_origin": ["https://ok.example"]}]
)
def test_pages_from_elsewhere_reach_no_route(engine, entered, headers, settings):
    assert set(get_all(engine, headers, settings).values()) == {403}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": f"http://{HERE}"},
        {"origin": f"https://{HERE}", "sec-fetch-site": "same-origin"},  # a proxy that speaks TLS
        {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"},
        {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"},
        {"origin": "http://ok.example:8000", "sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"},
    ],
)
def test_own_pages_allowed_ones_and_clients_that_are_no_browsers(engine, entered, headers):
    settings = {"cors_allow_origin": ["http://ok.example:8000"]}
    assert set(get_all(engine, headers, settings).values()) == {299}
    assert set(get_all(engine, headers | EVIL, {"cors_allow_origin": "*"}).values()) == {299}


def test_a_link_leads_to_pages_and_to_nothing_that_changes(engine, entered):
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    found = get_all(engine, headers, {})
    for (path, method, access), status in found.items():
        may = method in ("GET", "HEAD") and access < Access.OWNER
        assert status == (299 if may else 403), (path, method)
    assert found["/", "GET", Access.PUBLIC] == 299
    assert found["/flush_cache", "GET", Access.ADMIN] == 403


@pytest.mark.parametrize(
    ("host", "settings", "open"),
    [
        ("evil.example", {}, False),
        ("evil.example:30000", {}, False),
        ("127.0.0.1.evil.example", {}, False),
        ("localhost.evil.example", {}, False),
        ("192.168.1.5:30000", {}, False),
        ("evil.example@localhost", {}, False),
        ("evil.example", {"admin_api_key": "a"}, False),  # users need no key
        ("evil.example", {"api_key": "k"}, None),  # the key is missing, whatever the name
        ("evil.example", {"host": "0.0.0.0"}, True),
        ("evil.example", {"allowed_hosts": ["ok.example"], "host": "0.0.0.0"}, False),
        ("ok.example:443", {"allowed_hosts": ["OK.example"]}, True),
        ("a.ok.example", {"allowed_hosts": ["*.ok.example"]}, True),
        ("aok.example", {"allowed_hosts": ["*.ok.example"]}, False),
        ("evil.example", {"allowed_hosts": ["*"]}, True),
        ("localhost", {}, True),
        ("LOCALHOST.:30000", {}, True),
        ("rootcellar.localhost:1", {}, True),
        ("127.0.0.1:30000", {}, True),
        ("127.8.8.8", {}, True),
        ("[::1]:30000", {}, True),
        ("[::1", {}, False),
        ("", {}, False),
    ],
)  # fmt: skip
def test_hosts(engine, entered, host, settings, open):
    statuses = get_all(engine, {"host": host}, settings)
    users = {status for (_, _, access), status in statuses.items() if access is Access.USER}
    assert users == {299 if open else 401 if open is None else 403}


def test_rebinding_and_foreign_pages_over_the_wire(engine):
    """No key, the default: what a page elsewhere would try."""
    with on_thread(engine) as url, httpx.Client(base_url=url, timeout=60) as client:
        host = url.removeprefix("http://")
        for path in ("/pause_generation", "/sleep", "/release_memory_occupation", "/flush_cache"):
            refused = client.post(path, headers={"Origin": "http://evil.example"})
            assert refused.status_code == 403
            assert refused.json()["error"]["code"] == "origin_not_allowed"
        assert not engine.status()["released"]
        assert not engine.status()["paused"]
        rebound = client.get("/cache/tree", headers={"Host": "evil.example"})
        assert rebound.status_code == 403
        assert "--allowed-hosts" in rebound.json()["error"]["message"]
        assert client.get("/cache/tree", headers={"Origin": url}).status_code == 200
        assert client.get("/cache/tree", headers={"Origin": f"https://{host}"}).status_code == 200
        assert client.get("/flush_cache").status_code == 200  # SGLang's clients
        preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        assert client.options("/generate", headers=preflight).status_code == 403


def test_a_page_that_was_allowed(engine):
    origin = "https://chat.example"
    settings = {"cors_allow_origin": [origin], "api_key": "k", "max_body_bytes": 1024}
    with on_thread(engine, **settings) as url, httpx.Client(base_url=url, timeout=60) as client:
        asked = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        preflight = client.options("/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == origin
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert client.options("/generate", headers=asked | EVIL | {"Origin": "http://evil.example"}).status_code == 400
        keyed = {"Origin": origin, "Authorization": "Bearer k"}
        for response, status in (
            (client.get("/v1/models", headers=keyed), 200),
            (client.get("/v1/models", headers={"Origin": origin}), 401),
            (client.get("/none", headers=keyed), 404),
            (client.post("/generate", headers=keyed, content=b"x" * 2000), 413),
        ):
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == origin
        assert client.get("/v1/models", headers=keyed | {"Origin": "http://evil.example"}).status_code == 403
        body = {"prompt": "a", "max_tokens": 2, "stream": True}
        streamed = client.post("/v1/completions", headers=keyed, json=body)
        assert streamed.headers["access-control-allow-origin"] == origin
        assert streamed.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cors_allow_origin": "https://chat.example/"}, "nothing after it"),
        ({"cors_allow_origin": "chat.example"}, "scheme"),
        ({"allowed_hosts": "ok.example:80"}, "without a port"),
        ({"allowed_hosts": "http://ok.example"}, "no host"),
    ],
)
def test_settings_that_name_nothing(settings, words):
    with pytest.raises(ConfigError, match=words):
        Browsers.of(ServerConfig(**settings), open=True)


def test_names():
    assert host_name("[::1]:80") == "::1"
    assert host_name("A.b.:80") == "a.b"
    assert [host_name(bad) for bad in ("a:b", "a b", "a/b", "[::1", "a:80:80", "u@a")] == [None] * 6
    assert is_loopback("::1")
    assert not is_loopback("127.0.0.1.nip.io")
