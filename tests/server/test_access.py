"""Who may do what: the keys, and the right of each route, however its path is spelled."""

from __future__ import annotations

import asyncio
import re
import socket
from urllib.parse import quote, unquote

import httpx
import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.responses import Response

from rootcellar.errors import ConfigError
from rootcellar.server.app import create_app, routers
from rootcellar.server.callers import Access, Caller, Callers
from rootcellar.server_config import ServerConfig
from serving import on_thread

USER = (
    "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses",
    "/generate", "/tokenize", "/detokenize", "/abort_request",
)  # fmt: skip
ADMIN = (
    "/hicache/storage-backend/clear",
    "/flush_cache", "/reset_prefix_cache", "/release_memory_occupation", "/resume_memory_occupation", "/sleep",
    "/wake_up", "/pause_generation", "/continue_generation", "/update_weights_from_disk", "/cache/check",
    "/update_weights_from_tensor", "/update_weights_from_distributed", "/init_weights_update_group",
    "/destroy_weights_update_group",
)  # fmt: skip
# Each key setting, and what (as user, as admin) is open to whoever brings which key.
SETTINGS = {
    "none": ({}, {None: (True, True), "u": (True, True)}),
    "api_key": ({"api_key": "u"}, {None: (False, False), "u": (True, True), "uu": (False, False)}),
    "admin_api_key": ({"admin_api_key": "a"}, {None: (True, False), "x": (True, False), "a": (True, True)}),
    "both": (
        {"api_key": "u", "admin_api_key": "a"},
        {None: (False, False), "u": (True, False), "a": (True, True), "ä": (False, False)},
    ),
    "several": (
        {"api_key": ["alice:u", "v"], "admin_api_key": "a"},
        {None: (False, False), "u": (True, False), "v": (True, False), "a": (True, True), "alice:u": (False, False)},
    ),
    "several, no admin": ({"api_key": ["u", "v"]}, {None: (False, False), "u": (True, False)}),
}
KEYS = [(name, key) for name, (_, keys) in SETTINGS.items() for key in keys]
# Every setting, and everybody: who has no key, a user, an owner, the admin.
WALKED = [
    ("none", None), ("api_key", None), ("admin_api_key", None), ("both", "u"), ("both", "a"), ("several", "u"),
]  # fmt: skip
WALKED_AT_NIGHT = [("api_key", "u"), ("admin_api_key", "a"), ("both", None)]


def bearer(key):
    return {"Authorization": f"Bearer {key}".encode()} if key else {}


def routes_of(app):
    return [route for router in routers(app.state.server) for route in router.routes]


# -- the walk ---------------------------------------------------------------------------------------------------------


def spellings(path):
    """Ways to write a path, as they come over the wire."""
    first, rest = path[:2], path[2:]
    yield path
    yield "".join(f"%{ord(c):02X}" for c in path)
    yield f"%2f{path[1:]}"
    yield f"/%{ord(path[1]):02x}{rest}" if rest else "/%"
    yield path.upper()
    yield first.upper() + rest
    yield path + "/"
    yield path + "//"
    yield "/" + path
    yield path.replace("/", "//")
    yield "/." + path
    yield f"/x/..{path}"
    yield from (path + end for end in ("%0A", "%0D", "%00", "%0a%0a", "%7F", "%C2%85", "%E2%80%A8"))
    yield from (start + path[1:] for start in ("/%0A", "/%00"))
    yield from (path + end for end in (";x", "%3Bx", "%20", "%3F", "?x=1", "?%0A", "%5C", "%FF", "."))


def matched(routes, path):
    """The right of the route that a path, once decoded, names exactly; None: no route's."""
    for route in routes:
        pattern = re.sub(r"\\\{\w+:path\\\}", ".*", re.escape(route.path))
        pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", pattern)
        if re.fullmatch(pattern, path):
            return route.access
    return None


async def ask(app, method, target, headers, host=b"127.0.0.1:30000"):
    """The status of one request, with the path read as uvicorn reads it; ``host`` None: it is among the headers."""
    raw, _, query = target.partition("?")
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": unquote(raw),
        "raw_path": raw.encode(), "query_string": query.encode(), "root_path": "", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 30000), "headers": headers if host is None else [(b"host", host), *headers],
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("name", "key"), [*WALKED, *(pytest.param(*each, marks=pytest.mark.long) for each in WALKED_AT_NIGHT)]
)
def test_every_route_by_every_spelling(engine, monkeypatch, name, key):
    """Whether a request gets into a route is a matter of the route that it reaches, and of nothing else."""

    async def enter(_route, scope, receive, send):
        await Response(status_code=299)(scope, receive, send)

    monkeypatch.setattr(APIRoute, "handle", enter)
    settings, keys = SETTINGS[name]
    app = create_app(engine, ServerConfig(**settings))
    routes = routes_of(app)
    assert len(routes) > 50
    tried = [route for route in routes if not route.path.startswith("/page/")] + [routes[-1]]
    user, admin = keys[key]
    owner = admin or (user and name == "several")  # whose key has a name
    may = {Access.PUBLIC: True, Access.USER: user, Access.OWNER: owner, Access.ADMIN: admin}
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []

    async def walk():
        entered = 0
        for route in tried:
            written = re.sub(r"\{.*\}", "demo", route.path)
            for method in (*sorted(route.methods), "OPTIONS"):
                for target in spellings(written):
                    path = unquote(target.partition("?")[0])
                    right = matched(routes, path)
                    if re.search("[\0-\x1f\x7f-\x9f]", path):
                        expected = 400
                    elif right is None:
                        expected = 404 if user else 401
                    else:
                        expected = 299 if may[right] else 401
                    assert await ask(app, method, target, headers) == expected, (method, target)
                    entered += expected == 299
        return entered

    assert asyncio.run(walk()) > 40  # the public ones at least


def test_every_route_of_the_app_declares_its_right(engine):
    """Whatever the app answers with is one of the routes that were walked, and each of them has a right."""
    app = create_app(engine, ServerConfig())
    known = routes_of(app)
    assert {route.access for route in known} == set(Access)
    found = [context.original_route for context in iter_route_contexts(app.router.routes)]
    assert set(map(id, found)) == set(map(id, known))
    assert {r.path for r in known if r.access is Access.ADMIN} >= {*ADMIN}
    assert {r.path for r in known if r.access is Access.USER} >= {*USER}
    public = {r.path for r in known if r.access is Access.PUBLIC}
    open_to_all = {"/", "/docs", "/health", "/health_generate", "/ping", "/ready", "/version"}
    assert {p for p in public if not p.startswith("/page/")} == open_to_all


def test_a_route_without_a_right_is_refused(engine):
    app = create_app(engine, ServerConfig())
    careless = APIRouter()
    called = []
    careless.add_api_route("/forgotten", lambda: called.append(1), methods=["GET"])
    app.include_router(careless)
    assert asyncio.run(ask(app, "GET", "/forgotten", [])) == 403
    assert not called


def raw_status(url, request):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        return int(connection.recv(65536).split()[1])


def test_over_the_wire(engine):
    """What a real client and a real server make of spellings: the admin's and the owners' routes stay theirs."""
    with on_thread(engine, admin_api_key="a") as url:
        host = url.removeprefix("http://")
        for route in routes_of(create_app(engine, ServerConfig())):
            if route.access < Access.OWNER:
                continue
            (method, *_) = route.methods
            for target in (
                route.path, f"{url}{route.path}", f"http://elsewhere{route.path}", quote(route.path, safe=""),
                f"{route.path}%0A", f"{route.path}%0D", f"{route.path}%00", f"{url}{route.path}%0A", f"{route.path}/",
                f"//{route.path}", f"{route.path};x", f"{route.path}\\n", f"{route.path}\n",
            ):  # fmt: skip
                request = (
                    f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
                assert raw_status(url, request.encode()) in (400, 401, 404), target


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_who_may_do_what(engine, name, key):
    """Closed routes refuse before they read a body; open ones get as far as finding fault with it."""
    settings, keys = SETTINGS[name]
    user, admin = keys[key]
    with on_thread(engine, **settings) as url, httpx.Client(base_url=url, headers={}, timeout=60) as client:
        headers = bearer(key)
        for paths, allowed in ((USER, user), (ADMIN, admin)):
            for path in paths:
                status = client.post(path, content=b"{", headers=headers).status_code
                assert (status != 401) is allowed, path
        assert (client.get("/v1/models", headers=headers).status_code == 200) is user
        assert (client.get("/no/such/route", headers=headers).status_code == 404) is user
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200


def test_a_refusal_says_what_is_missing(engine):
    with on_thread(engine, api_key="u", admin_api_key="a") as url:
        response = httpx.post(f"{url}/flush_cache", headers=bearer("u"), timeout=60)
        assert response.json()["error"]["type"] == "authentication_error"
        assert "admin_api_key" in response.json()["error"]["message"]
        assert response.headers["www-authenticate"] == "Bearer"
        everything = httpx.post(f"{url}/abort_request", headers=bearer("u"), json={"abort_all": True}, timeout=60)
        assert everything.status_code == 401
        assert (
            httpx.post(f"{url}/abort_request", headers=bearer("a"), json={"abort_all": True}, timeout=60).status_code
            == 200
        )


@pytest.mark.parametrize("settings", [{"admin_api_key": "a"}, {"api_key": "u", "admin_api_key": "a"}])
def test_limits_hold_whatever_the_key(engine, settings):
    """The limit on bodies is the gate's, before any right."""
    with on_thread(engine, max_body_bytes=2048, **settings) as url:
        for path in ("/generate", "/flush_cache", "/no/such/route"):
            for key in (None, "u", "a"):
                assert httpx.post(url + path, content=b"x" * 3000, headers=bearer(key), timeout=60).status_code == 413


def test_keys_and_names(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\n\nbob:b-key\nalice:second\n")
    callers = Callers.of(ServerConfig(api_key=["alice:a-key", "plain", ":with:colon"], api_key_file=file))
    assert callers.tenants == ("alice", "key-2", "key-3", "bob")
    assert callers.of_token(b"a-key") == callers.of_token(b"second") == Caller("alice")
    assert callers.of_token(b"with:colon") == Caller("key-3")
    assert callers.of_token(b"b-key") == Caller("bob")
    assert callers.of_token(b"bob:b-key") is None
    assert callers.of_token(b"") is None
    assert Callers.of(ServerConfig(api_key="one")).of_token(b"one") == Caller("", admin=True)
    assert Callers.of(ServerConfig(api_key="me:one")).of_token(b"one") == Caller("me", admin=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"api_key": ["a", "a"]}, "equal"),
        ({"api_key": "a", "admin_api_key": "a"}, "equal"),
        ({"api_key": "name:"}, "empty"),
        ({"api_key": " a"}, "spaces"),
        ({"api_key": "na me:key"}, "'na me'"),
        ({"api_key_file": "/nowhere/keys"}, "api_key_file"),
        ({"api_key_file": "/dev/null"}, "names no key"),
    ],
)
def test_keys_that_cannot_be_used(settings, words):
    with pytest.raises(ConfigError, match=words):
        Callers.of(ServerConfig(**settings))
