"""The S3 store's own client, on a server that does as it is told; a real one is in ``tests/store_components``."""

import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from stores import name, put

from rootcellar.errors import ConfigError
from rootcellar.tiers.stores import s3


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    entered, gate = threading.Semaphore(0), threading.Event()

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.entered.release()
        assert self.gate.wait(30)
        self.do_HEAD()

    def log_message(self, *_):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(s3, "_signing", lambda _: lambda _method, _url, _length: {})
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        Handler.gate.set()
        server.shutdown()
        serving.join()


def test_calls_that_wait_for_their_turn_end_when_it_is_closed(url):
    """Those that were not begun too: whoever waits for them hears of it."""
    store = s3.open_store({"bucket": "b", "endpoint_url": url, "connections": 1}, "")
    with ThreadPoolExecutor(1) as beside:
        call = beside.submit(put, store, range(3))
        assert Handler.entered.acquire(timeout=30)
        store.close()
        Handler.gate.set()
        with pytest.raises(ValueError, match="the store is closed"):
            call.result(10)
    with pytest.raises(ValueError, match="the store is closed"):
        store.has([name(1)])


def test_what_is_no_server_of_http_is_said(url, monkeypatch):
    monkeypatch.setattr(Handler, "do_HEAD", lambda self: self.wfile.write(b"220 mail.example.org ESMTP\r\n\r\n"))
    with pytest.raises(ConfigError, match="cannot be used: the server answered with what is no HTTP"):
        s3.open_store({"bucket": "b", "endpoint_url": url}, "")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"endpoint_url": "http://host:99999"}, "endpoint_url is not allowed"),
        ({"endpoint_url": "http://[::1"}, "endpoint_url is not allowed"),
        ({"endpoint_url": "https://host", "ca_certs": "/no/file"}, "ca_certs='/no/file' cannot be used"),
    ],
)
def test_what_is_wrong_with_an_address_or_certificates_is_said(extra, said):
    with pytest.raises(ConfigError, match=said):
        s3.open_store({"bucket": "b", **extra}, "")
