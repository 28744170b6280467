"""The service by which nodes find each other, by SGLang's routes."""

import errno
import http.client
import json
import socket
from dataclasses import replace

import pytest

from rootcellar.transfer.bootstrap import Bootstrap, Route, find
from rootcellar.transfer.terms import Terms
from rootcellar.transfer.wires.tcp import WireError

TERMS = Terms(16, "float32", "float32", (("full", "full", 0),), {"full": 4096}, "Qwen2ForCausalLM", "abcd")


@pytest.fixture
def service():
    service = Bootstrap("127.0.0.1", 0, token="secret")
    yield service
    service.close()


def say(service, method, path, body=None, token=None):
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=5)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def test_a_prefill_node_is_found_where_it_registered(service):
    assert say(service, "GET", "/health") == (200, "OK")
    with pytest.raises(WireError, match="no prefill node has registered"):
        find("127.0.0.1", service.port, 5)
    route = Route("10.0.0.9", 4711, "node", TERMS)
    assert say(service, "PUT", "/route", route.plain(), token="secret")[0] == 200
    assert find("127.0.0.1", service.port, 5) == route
    status, text = say(service, "GET", "/route?engine_rank=0&target_dp_group=0")
    said = json.loads(text)
    assert status == 200
    assert (said["rank_ip"], said["rank_port"], said["page_size"], said["dp_size"]) == ("10.0.0.9", 4711, 16, 1)
    service.register(replace(route, host="0.0.0.0").plain())
    assert find("127.0.0.1", service.port, 5).host == "127.0.0.1", "one that listens everywhere is where its service is"


def test_rooms_and_their_ranks_are_remembered(service):
    for room in (7, 2**62):
        assert say(service, "POST", "/register_dp_rank", {"bootstrap_room": room, "dp_rank": 0}, "secret")[0] == 200
    status, text = say(service, "POST", "/query_dp_ranks", {"bootstrap_rooms": [7, 8, 2**62]})
    assert (status, json.loads(text)) == (200, {"7": 0, str(2**62): 0})


@pytest.mark.parametrize("token", [None, "other"])
def test_nobody_registers_without_the_token(service, token):
    assert say(service, "PUT", "/route", {"rank_ip": "10.6.6.6"}, token)[0] == 401
    assert service.route() is None


def test_what_makes_no_sense_is_refused_and_the_service_goes_on(service):
    assert say(service, "GET", "/other")[0] == 404
    assert say(service, "PUT", "/other", {})[0] == 404
    assert say(service, "POST", "/query_dp_ranks", [])[0] == 400
    assert say(service, "POST", "/register_dp_rank", {"dp_rank": "x"}, "secret")[0] == 400
    assert say(service, "POST", "/query_dp_ranks", {"bootstrap_rooms": "a" * (1 << 21)})[0] == 411
    assert say(service, "GET", "/health")[0] == 200
    service.register({"rank_ip": "10.0.0.9", "rank_port": 1, "page_size": 64})
    with pytest.raises(WireError, match=r"no prefill node of rootcellar.*64"):
        find("127.0.0.1", service.port, 5)


def test_what_differs_is_said_with_both_values():
    theirs = replace(TERMS, page_size=64, kv_cache_dtype="bfloat16", kinds=(("full", "full", 0), ("w", "recurrent", 0)))
    assert Terms.read(json.loads(json.dumps(theirs.plain()))) == theirs
    told = TERMS.differences(theirs, "the decode node", "the prefill node")
    assert "page_size is 16 on the decode node and 64 on the prefill node" in told
    assert "kv_cache_dtype is 'float32' on the decode node and 'bfloat16' on the prefill node" in told
    assert "['w', 'recurrent', 0]" in told
    assert TERMS.differences(Terms.read(TERMS.plain()), "a", "b") == ""
    for wrong in (None, {}, {**TERMS.plain(), "kinds": 3}, {**TERMS.plain(), "page_size": "x"}):
        with pytest.raises(WireError):
            Terms.read(wrong)


def test_a_service_without_open_files_for_a_moment_goes_on(service, monkeypatch):
    accept, failed = socket.socket.accept, []

    def full(listener):
        if not failed:
            failed.append(errno.EMFILE)
            raise OSError(errno.EMFILE, "too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", full)
    for _ in range(3):  # the service may wait in the old one
        assert say(service, "GET", "/health") == (200, "OK")
    assert failed
