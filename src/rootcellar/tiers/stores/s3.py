"""Any S3 server: each page is one object. Requests are signed by botocore and sent from and read into memory as it is.

Objects are sent without a hash of their own (``UNSIGNED-PAYLOAD``): a page has its checksum in it.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

from rootcellar.errors import ConfigError
from rootcellar.tiers.numbers import positive
from rootcellar.tiers.settings import need, nothing_else, take_choice, take_optional, take_text
from rootcellar.tiers.store import check_names

_T = TypeVar("_T")
_KNOWN = (
    "bucket, endpoint_url, region_name, aws_access_key_id, aws_secret_access_key, aws_session_token, prefix, "
    "addressing_style, connections, ca_certs, timeout"
)


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Of a store in a bucket."""

    bucket: str
    endpoint_url: str
    region_name: str = "us-east-1"
    keys: tuple[str, str, str | None] | None = field(default=None, repr=False)
    """Access key, its secret, and a session's token; None: what botocore finds (environment, files, the machine)."""
    prefix: str = "rootcellar/"
    virtual: bool = False
    """Whether the bucket is in the host's name, not in the path."""
    connections: int = 8
    """Requests at once."""
    ca_certs: str | None = None
    timeout: float = 5.0


def read_settings(extra: Mapping[str, object]) -> S3Settings:
    """What ``--hicache-storage-backend-extra-config`` says of an S3 store. Raises ``ConfigError``."""
    own = dict(extra)
    region = take_text(own, "region_name", "us-east-1")
    url = take_text(own, "endpoint_url", f"https://s3.{region}.amazonaws.com").rstrip("/")
    wrong = ConfigError("endpoint_url is not allowed: write http://host:port or https://host")
    try:
        parts = urlsplit(url)
        named = parts.hostname is not None and parts.port != 0
    except ValueError:
        raise wrong from None
    if parts.scheme not in ("http", "https") or not named or parts.path or parts.query or parts.username:
        raise wrong
    key = take_optional(own, "aws_access_key_id", secret=True)
    secret = take_optional(own, "aws_secret_access_key", secret=True)
    token = take_optional(own, "aws_session_token", secret=True)
    if (key is None) != (secret is None):
        raise ConfigError("aws_access_key_id and aws_secret_access_key go together: give both, or none")
    settings = S3Settings(
        bucket=take_text(own, "bucket"),
        endpoint_url=url,
        region_name=region,
        keys=None if key is None or secret is None else (key, secret, token),
        prefix=take_text(own, "prefix", "rootcellar/"),
        virtual=take_choice(own, "addressing_style", ("path", "virtual"), "path") == "virtual",
        connections=int(positive(own, "connections", 8, whole=True)),
        ca_certs=take_optional(own, "ca_certs"),
        timeout=positive(own, "timeout", 5.0),
    )
    nothing_else(own, "s3", _KNOWN)
    return settings


class S3Store:
    """A :class:`~rootcellar.tiers.store.Store` in a bucket."""

    verifies = False

    def __init__(self, settings: S3Settings) -> None:
        """Raises ``ConfigError``: botocore is missing, or the bucket cannot be used."""
        self.settings = settings
        parts = urlsplit(settings.endpoint_url)
        host = str(parts.hostname)
        host = f"{settings.bucket}.{host}" if settings.virtual else host
        self._origin = f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port else "")
        self._base = "/" if settings.virtual else f"/{quote(settings.bucket)}/"
        try:
            self._connect = _connecting(parts.scheme == "https", host, parts.port, settings)
        except OSError as error:
            raise ConfigError(f"ca_certs={settings.ca_certs!r} cannot be used: {error}") from None
        self._sign = _signing(settings)
        self._lock = threading.Lock()
        self._free: list[http.client.HTTPConnection] = []
        self._pool = ThreadPoolExecutor(settings.connections, thread_name_prefix="rootcellar-s3")
        self._closed = False
        try:
            status, _ = self._request("HEAD", "")
        except OSError as error:
            raise ConfigError(f"the s3 store at {settings.endpoint_url} cannot be used: {error}") from None
        if status != 200:
            raise ConfigError(
                f"the s3 store at {settings.endpoint_url} cannot be used: bucket {settings.bucket!r} answers {status}"
            )

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names)
        return self._each(lambda name: self._found(self._request("HEAD", self._key(name))[0]), names)

    def get(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names, into)
        return self._each(self._get, names, into)

    def put(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """See ``Store``. Raises ``OSError``."""
        check_names(names, blocks)

        def put(name: bytes, block: memoryview) -> None:
            status, said = self._request("PUT", self._key(name), block.cast("B"))
            if status not in (200, 204):
                raise OSError(f"the server answered {status} to PUT: {said[:200]!r}")

        once = dict(zip(names, blocks, strict=True))  # some servers fail at two requests for one key at a time
        self._each(put, list(once), list(once.values()))
        return [True] * len(names)

    def clear(self) -> int:
        """See ``Store``: every object whose key begins with our prefix. Raises ``OSError``."""
        return sum(self._each(self._delete, list(self._keys())))

    def register(self, _buffer: memoryview) -> None:
        """Nothing comes of it."""

    def close(self) -> None:
        """See ``Store``. Requests that are under way end by themselves, and those that wait for their turn at once."""
        with self._lock:
            self._closed = True
            free, self._free = self._free, []
            self._pool.shutdown(wait=False)  # nothing is cancelled: ``wait`` would never hear of it
        for connection in free:
            connection.close()

    def _key(self, name: bytes) -> str:
        return self.settings.prefix + name.hex()

    def _each(self, call: Callable[..., _T], *items: Sequence[Any]) -> list[_T]:
        with self._lock:  # all of them are begun, or none
            if self._closed:
                raise ValueError("the store is closed")
            calls = [self._pool.submit(call, *each) for each in zip(*items, strict=True)]
        wait(calls)  # all of them, as whoever is told of an error may use its memory again
        return [each.result() for each in calls]

    def _get(self, name: bytes, view: memoryview) -> bool:
        status, said = self._request("GET", self._key(name), into=view.cast("B"))
        return self._found(status) and said == b""

    def _delete(self, key: str) -> bool:
        status, said = self._request("DELETE", key)
        if status not in (200, 204, 404):
            raise OSError(f"the server answered {status} to DELETE: {said[:200]!r}")
        return status != 404

    def _keys(self) -> Iterator[str]:
        """All keys with our prefix, a thousand a request."""
        more = ""
        while True:
            status, said = self._request(
                "GET", "", query=f"list-type=2&prefix={quote(self.settings.prefix, safe='')}{more}"
            )
            if status != 200:
                raise OSError(f"the server answered {status} to a listing: {said[:200]!r}")
            tree = ElementTree.fromstring(said)
            space = tree.tag.partition("}")[0] + "}" if tree.tag.startswith("{") else ""
            yield from (str(key.text) for key in tree.iterfind(f"{space}Contents/{space}Key"))
            token = tree.findtext(f"{space}NextContinuationToken")
            if not token:
                return
            more = f"&continuation-token={quote(token, safe='')}"

    @staticmethod
    def _found(status: int) -> bool:
        if status not in (200, 404):
            raise OSError(f"the server answered {status}")
        return status == 200

    # --- requests -----------------------------------------------------------------------------------------------------

    def _request(
        self, method: str, key: str, body: memoryview | None = None, *, query: str = "", into: memoryview | None = None
    ) -> tuple[int, bytes]:
        """Its status, and what was said: of a page that filled ``into`` exactly, nothing. Raises ``OSError``.

        A connection that was used before and has ended is tried once more.
        """
        path = self._base + quote(key) + (f"?{query}" if query else "")
        headers = self._sign(method, self._origin + path, 0 if body is None else len(body))
        with self._lock:
            if self._closed:
                raise ValueError("the store is closed")
            kept = self._free.pop() if self._free else None
        if kept is not None:
            with contextlib.suppress(ConnectionError):
                return self._on(kept, method, path, body, headers, into)
        return self._on(self._connect(), method, path, body, headers, into)

    def _on(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: memoryview | None,
        headers: Mapping[str, str],
        into: memoryview | None,
    ) -> tuple[int, bytes]:
        try:
            connection.request(method, path, body=body, headers=dict(headers))
            response = connection.getresponse()
            if into is not None and response.status == 200:
                said = _fill(response, into)
            else:
                said = response.read()
        except http.client.HTTPException as error:
            connection.close()
            raise ConnectionError(f"the server answered with what is no HTTP: {error!r}") from error
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if self._closed or response.will_close:
                connection.close()
            else:
                self._free.append(connection)
        return response.status, said


def _fill(response: http.client.HTTPResponse, into: memoryview) -> bytes:
    """Read a page; what is not its length is read to the end and said."""
    if response.length not in (len(into), None):
        return response.read() or b"nothing"
    done = 0
    while done < len(into):
        count = response.readinto(into[done:])
        if not count:
            return b"too short"
        done += count
    return response.read()


def open_store(extra: Mapping[str, object], _identity: str) -> S3Store:
    """See ``registry``."""
    return S3Store(read_settings(extra))


def _connecting(
    tls: bool, host: str, port: int | None, settings: S3Settings
) -> Callable[[], http.client.HTTPConnection]:
    if not tls:
        return lambda: http.client.HTTPConnection(host, port, timeout=settings.timeout, blocksize=1 << 20)
    context = ssl.create_default_context(cafile=settings.ca_certs)
    return lambda: http.client.HTTPSConnection(host, port, timeout=settings.timeout, context=context)


def _signing(settings: S3Settings) -> Callable[[str, str, int], dict[str, str]]:
    """Headers of a request, given its method, address and the length of its body."""

    def botocore(module: str) -> ModuleType:
        return need(f"botocore.{module}", "rootcellar[s3]", "an s3 store")

    auth, awsrequest, credentials = botocore("auth"), botocore("awsrequest"), botocore("credentials")
    if settings.keys is not None:
        found = credentials.Credentials(*settings.keys)
    else:
        found = botocore("session").get_session().get_credentials()
        if found is None:
            raise ConfigError("an s3 store needs keys: give aws_access_key_id and aws_secret_access_key")

    class Unsigned(auth.S3SigV4Auth):  # type: ignore[misc, name-defined]
        def payload(self, _request: object) -> str:
            return "UNSIGNED-PAYLOAD"

    def sign(method: str, url: str, length: int) -> dict[str, str]:
        request = awsrequest.AWSRequest(method, url, headers={"Content-Length": str(length)} if length else {})
        Unsigned(found.get_frozen_credentials(), "s3", settings.region_name).add_auth(request)
        return dict(request.headers.items())

    return sign
