"""The components that stores stand on, each started as its users start it: what is missing says so.

A ``Component`` opens stores on a medium of their own: what one test puts no other sees.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rootcellar.tiers.conformance.subject import ServerProcess, Subject
from rootcellar.tiers.stores.registry import open_bare

ENVIRONMENTS = Path(os.environ.get("ROOTCELLAR_STORES", Path(__file__).parents[2] / ".venv-stores"))
"""Where ``scripts/prepare_stores.sh`` has put what it could install."""
_fresh = itertools.count()


class Missing(Exception):
    """This component cannot be run here, and why."""


class Sidecars:
    """The processes of stores that start one themselves, and again when it died."""

    def __init__(self, script: str) -> None:
        """Each runs ``script``."""
        self._script = script

    def kill(self) -> None:
        """``kill -9`` of all that this process has. Raises ``RuntimeError``: there is none."""
        children = _said(["ps", "--ppid", str(os.getpid()), "-ww", "-o", "pid=,args="]).splitlines()
        found = [int(line.split(None, 1)[0]) for line in children if self._script in line]
        if not found:
            raise RuntimeError(f"nothing of {self._script} is there that could be killed, but {children}")
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start(self) -> None:
        """The store does."""


FORKING = """
import os, signal, socket, sys
from importlib.metadata import entry_points

class Again(socket.socket):
    def bind(self, address):
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        super().bind(address)

socket.socket = Again
(program,) = entry_points(group="console_scripts", name=sys.argv[1])
sys.argv = sys.argv[1:]
main = program.load()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in sys.stdin:
    if pid := os.fork():
        print(pid, flush=True)
        continue
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(2, 1)
    main()
    os._exit(0)
"""
"""A program's command, which has imported all it needs, and begins when it is told: for one that imports torch. It has
its port at once, which the system keeps for a minute after one that was killed, unless it is asked for so."""


class Forked:
    """A process that another one began, as far as a ``Popen`` of it is used."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return 0
        return None

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)


class ForkedServer(ServerProcess):
    """One whose command is ``FORKING``: each start is a fork of a process that lives until :meth:`end`."""

    _before: subprocess.Popen | None = None

    def _begin(self) -> Forked:
        if self._before is None:
            with open(self._log, "ab") as log:
                self._before = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
        assert self._before.stdin is not None
        assert self._before.stdout is not None
        print("start", file=self._before.stdin, flush=True)
        return Forked(int(self._before.stdout.readline()))

    def end(self) -> None:
        if self._before is not None:
            self._before.kill()
            self._before.communicate()


@dataclass
class Component:
    """A running component.

    ``backend`` with ``extra(fresh)`` opens a store on it; ``fresh`` is a word that no test had before.
    """

    backend: str
    extra: Callable[[str], dict]
    version: str
    server: ServerProcess | None = None
    sidecars: Sidecars | None = None
    deletes: bool = True
    sees_ends: bool = True
    close: Callable[[], None] = field(default=lambda: None)

    def settings(self) -> dict:
        return self.extra(f"t{os.getpid()}n{next(_fresh)}")

    def subject(self) -> Subject:
        opened = functools.partial(open_bare, self.backend, self.settings(), "tests")
        return Subject(opened, opened, self.server, self.deletes, self.sees_ends)

    def stop(self) -> None:
        if self.server is not None:
            self.server.kill()
        self.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _program(name: str, how: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Missing(f"{name} is not installed: {how}")
    return found


def _in(environment: str, program: str) -> str:
    found = ENVIRONMENTS / environment / "bin" / program
    if not found.exists():
        raise Missing(f"{program} is not in the environment {environment}: make test-stores makes it")
    return str(found)


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    return (done.stdout + done.stderr).strip()


def _installed(package: str, environment: str = "client") -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return _said([_in(environment, "python"), "-c", code])


def _answering(backend: str, extra: dict) -> Callable[[], None]:
    def answers():
        store = open_bare(backend, extra, "tests")
        try:
            store.has([bytes(32)])
        finally:
            store.close()

    return answers


def _serve(command: list[str], folder: Path, backend: str, extra: dict) -> ServerProcess:
    return ServerProcess(command, folder / "log", _answering(backend, extra))


def redis(folder: Path) -> Component:
    program = _program("redis-server", "apt-get install redis-server")
    path = folder / "socket"
    command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)]
    url = f"unix://{path}"
    server = _serve(command, folder, "redis", {"url": url, "timeout": 2})
    server.start()
    version = _said([program, "--version"]).partition("v=")[2].partition(" ")[0]
    return Component("redis", lambda fresh: {"url": url, "prefix": f"{fresh}:", "timeout": 2}, version, server)


def redis_tls(folder: Path) -> Component:
    """Over TLS, with a password, on a port: other settings of the same."""
    program, openssl = _program("redis-server", "apt-get install redis-server"), _program("openssl", "apt-get")
    port, key, cert = free_port(), folder / "key.pem", folder / "cert.pem"
    request = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key)]
    _said([*request, "-out", str(cert), "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"])
    command = [
        program,
        "--port",
        "0",
        "--tls-port",
        str(port),
        "--tls-cert-file",
        str(cert),
        "--tls-key-file",
        str(key),
    ]
    command += ["--tls-auth-clients", "no", "--requirepass", "open sesame", "--save", "", "--dir", str(folder)]
    command += ["--bind", "127.0.0.1"]
    extra = {"url": f"rediss://localhost:{port}/1", "password": "open sesame", "ca_certs": str(cert), "timeout": 2}
    server = _serve(command, folder, "redis", extra)
    server.start()
    return Component("redis", lambda fresh: {**extra, "prefix": f"{fresh}:"}, "TLS", server)


BUCKET = "pages"


def _bucket_server(folder: Path) -> tuple[ServerProcess, str]:
    """A running S3 server and where it is; whenever it starts it has an empty bucket."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    def answers():
        making = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
        urllib.request.urlopen(making, timeout=5).close()

    command = [_in("client", "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = ServerProcess(command, folder / "log", answers)
    server.start()
    return server, url


def s3(folder: Path) -> Component:
    server, url = _bucket_server(folder)
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    extra = {"bucket": BUCKET, "endpoint_url": url, **keys, "timeout": 2}
    version = f"moto_server {_installed('moto')}, botocore {_installed('botocore')}"
    return Component("s3", lambda fresh: {**extra, "prefix": f"{fresh}/"}, version, server)


def s3_client(extra: dict, **more):
    """Botocore's, to the server of an S3 store of these settings."""
    from botocore.session import get_session

    keys = {name: extra[name] for name in ("endpoint_url", "aws_access_key_id", "aws_secret_access_key")}
    return get_session().create_client("s3", region_name="us-east-1", **keys, **more)


def lmcache(folder: Path) -> Component:
    port = free_port()
    extra = {"url": f"lm://127.0.0.1:{port}", "timeout": 2}
    environment = ["env", "OMP_NUM_THREADS=1", "LMCACHE_TRACK_USAGE=false"]
    command = [*environment, _in("lmcache", "python"), "-c", FORKING, "lmcache_server", "127.0.0.1", str(port)]
    server = ForkedServer(command, folder / "log", _answering("lmcache", extra))
    server.start()
    version = _installed("lmcache", "lmcache")

    def settings(fresh: str) -> dict:
        return {**extra, "namespace": fresh}

    return Component("lmcache", settings, version, server, deletes=False, close=server.end)


def mooncake(folder: Path) -> Component:
    """With a client that lends memory as long as the tests run, so that what is put outlives whoever put it."""
    port, metrics = free_port(), free_port()
    command = [_in("client", "mooncake_master"), "-rpc_address=127.0.0.1", f"-rpc_port={port}"]
    command += ["-metrics_host=127.0.0.1", f"-metrics_port={metrics}", "-default_kv_lease_ttl=500"]
    extra = {"master_server_address": f"127.0.0.1:{port}", "global_segment_size": 0}

    def answers():
        socket.create_connection(("127.0.0.1", port), 1).close()

    server = ServerProcess(command, folder / "log", answers)
    server.start()
    try:
        holder = open_bare("mooncake", {**extra, "global_segment_size": "512MiB"}, "tests")
    except BaseException:
        server.kill()
        raise
    version = _installed("mooncake-transfer-engine-non-cuda")
    return Component("mooncake", lambda fresh: {**extra, "prefix": fresh}, version, server, close=holder.close)


def nixl_posix(folder: Path) -> Component:
    version = f"NIXL {_installed('nixl', 'nixl')} POSIX"
    return Component("nixl", lambda fresh: {"path": str(folder / fresh)}, version)


def nixl_obj(folder: Path) -> Component:
    version = f"NIXL {_installed('nixl', 'nixl')} OBJ, moto_server {_installed('moto')}"
    server, url = _bucket_server(folder)
    extra = {"plugin": "OBJ", "bucket": BUCKET, "endpoint_override": url, "access_key": "key", "secret_key": "secret"}
    can = {"deletes": False, "sees_ends": False}
    return Component("nixl", lambda fresh: {**extra, "prefix": f"{fresh}/"}, version, server, **can)


def hf3fs(folder: Path) -> Component:
    """On a real FUSE mount, bindfs; 3FS itself needs a cluster."""
    program = _program("bindfs", "apt-get install bindfs fuse3")
    under, mount = folder / "under", folder / "mount"
    under.mkdir()
    mount.mkdir()
    said = _said([program, str(under), str(mount)])
    if not os.path.ismount(mount):
        raise Missing(f"bindfs cannot mount: {said or 'no reason given'}")

    def unmount():
        _said(["umount", "--lazy", str(mount)])

    def extra(fresh: str) -> dict:
        return {"file_path_prefix": str(mount / fresh), "file_size": "256MiB"}

    return Component("hf3fs", extra, f"FUSE by {_said([program, '--version'])}", close=unmount)


def aibrix(folder: Path, l2: str = "SHFS") -> Component:
    python = _in("aibrix", "python")
    version = f"aibrix-kvcache {_installed('aibrix-kvcache', 'aibrix')} {l2}"

    def extra(fresh: str) -> dict:
        return {"python": python, "path": str(folder / fresh), "l2": l2}

    return Component("aibrix", extra, version, sidecars=Sidecars("aibrix_sidecar.py"))


def chain(folder: Path) -> Component:
    """Slots of a file, which several may share, in front of Redis."""
    far = redis(folder)

    def extra(fresh: str) -> dict:
        near = {"backend": "hf3fs", "file_path_prefix": str(folder / fresh), "file_size": "256MiB"}
        return {"stores": [near, {"backend": "redis", **far.extra(fresh)}]}

    return Component("chain", extra, f"hf3fs and Redis {far.version}", close=far.stop)


COMPONENTS: dict[str, Callable[[Path], Component]] = {
    "redis": redis,
    "redis-tls": redis_tls,
    "s3": s3,
    "lmcache": lmcache,
    "mooncake": mooncake,
    "nixl-posix": nixl_posix,
    "nixl-obj": nixl_obj,
    "hf3fs": hf3fs,
    "aibrix": aibrix,
    "chain": chain,
}
"""By name; each starts one, in a folder of its own, or raises ``Missing``."""
ENVIRONMENTS_OF: dict[str, tuple[str, ...]] = {
    "s3": ("client",),
    "mooncake": ("client",),
    "nixl-posix": ("nixl",),
    "nixl-obj": ("nixl", "client"),
    "lmcache": ("lmcache",),
    "aibrix": ("aibrix",),
}
"""Where what each needs is installed (``requirements/stores-NAME.txt``); others need programs of the system only."""
IN_OURS = frozenset({"s3", "mooncake", "nixl-posix", "nixl-obj"})
"""Those of which a part comes into the process of the store: the first of their environments is its."""
