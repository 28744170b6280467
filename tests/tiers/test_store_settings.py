"""What ``--hicache-storage-backend-extra-config`` says: of prefetching, of the guard, and of the store."""

import json
import socket
import subprocess
import sys
import threading

import pytest

from rootcellar.config import EngineConfig
from rootcellar.errors import ConfigError
from rootcellar.tiers.prefetching import PrefetchSettings
from rootcellar.tiers.settings import hide, need, read_extra, shown_extra
from rootcellar.tiers.stores import open_store


def test_settings_of_prefetching_are_split_from_those_of_the_store():
    given = {"path": "/pages", "prefetch_threshold": 32, "prefetch_timeout_base": 1, "prefetch_timeout_max": 4.5}
    settings, rest = PrefetchSettings.split(given)
    assert settings == PrefetchSettings(32, 1.0, 0.1, 4.5)
    assert rest == {"path": "/pages"}
    assert len(given) == 4
    assert PrefetchSettings.split({}) == (PrefetchSettings(256, 2.0, 0.1, 30.0), {})


def test_a_longer_prefix_is_waited_for_longer_up_to_the_most():
    settings = PrefetchSettings()
    assert settings.timeout(0) == 2.0
    assert settings.timeout(10 * 1024) == pytest.approx(3.0)
    assert settings.timeout(10**6) == 30.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefetch_threshold", 2.5),
        ("prefetch_threshold", True),
        ("prefetch_timeout_base", -1),
        ("prefetch_timeout_per_ki_token", "0.1"),
        ("prefetch_timeout_max", float("inf")),
        ("prefetch_timeout_max", None),
    ],
)
def test_a_wrong_setting_of_prefetching_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}=.* is not allowed: give a"):
        PrefetchSettings.split({name: value})


def test_a_store_is_opened_by_its_kind_and_guarded(tmp_path):
    store = open_store("file", {"path": str(tmp_path), "min_free_space": 0, "max_size": "1MiB", "deadline": 3}, "m")
    assert store.put([bytes(32)], [memoryview(b"image")]) == [True]
    assert store.stats()["put"].hits == 1
    store.close()
    reader = open_store("file", {"path": str(tmp_path), "read_only": True}, "m")
    assert reader.has([bytes(32)]) == [True]
    reader.close()


@pytest.mark.parametrize(
    ("backend", "extra", "said"),
    [
        ("flie", {}, "hicache_storage_backend='flie' is not there: choose from file"),
        ("file", {}, "path=None is not allowed"),
        ("file", {"path": "x", "fsync": 1}, "fsync=1 is not allowed: it must be true or false"),
        ("dynamic", {"class_name": "A"}, "module_path=None is not allowed: give a string"),
        (
            "dynamic",
            {"module_path": "no.such", "class_name": "A"},
            "module_path='no.such' is not allowed: it cannot be",
        ),
        (
            "dynamic",
            {"module_path": "json", "class_name": "A"},
            "class_name='A' is not allowed: json has no such class",
        ),
        ("dynamic", {"module_path": "json", "class_name": "JSONDecoder"}, "JSONDecoder of json could not be opened"),
        ("dynamic", {"module_path": "builtins", "class_name": "isinstance"}, "could not be opened"),
        ("chain", {}, "stores is not allowed: give a list of two or more"),
        ("chain", {"stores": [{"backend": "file"}]}, "give a list of two or more"),
        ("chain", {"stores": [{"backend": "file"}, {}]}, "path=None is not allowed"),
        ("chain", {"stores": [], "path": "x"}, "a chain store has no setting path; it has stores"),
        ("file", {"path": "x", "deadline": 0}, "deadline=0 is not allowed: give a number above 0"),
        ("file", {"path": "x", "prefetch_threshold": 1}, "no setting prefetch_threshold"),
    ],
)
def test_what_cannot_be_opened_says_why(backend, extra, said):
    with pytest.raises(ConfigError, match=said):
        open_store(backend, extra, "")


def test_a_class_that_is_no_store_says_what_it_lacks(tmp_path):
    (tmp_path / "half.py").write_text(
        "class Half:\n    def __init__(self, extra, identity): pass\n    def has(self): pass\n"
    )
    with pytest.raises(
        ConfigError, match=r"Half of .* is no store: it lacks get, put, clear, register, close, verifies"
    ):
        open_store("dynamic", {"module_path": str(tmp_path / "half.py"), "class_name": "Half"}, "")


def test_a_chain_that_cannot_be_opened_leaves_nothing_open(tmp_path):
    near = {"backend": "file", "path": str(tmp_path), "max_size": "1MiB"}
    with pytest.raises(ConfigError, match="'nowhere' is not there"):
        open_store("chain", {"stores": [near, {"backend": "nowhere"}]}, "")
    open_store("file", {"path": str(tmp_path), "max_size": "1MiB"}, "").close()  # nobody writes in it


def test_settings_are_read_from_json_toml_and_yaml(tmp_path):
    texts = {"a.json": '{"path": "x", "deadline": 2}', "a.toml": 'path = "x"\ndeadline = 2'}
    texts |= {"a.yaml": "path: x\ndeadline: 2", "a.yml": "{path: x, deadline: 2}"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert read_extra(f"@{tmp_path / name}") == {"path": "x", "deadline": 2}
    (tmp_path / "b.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is no yaml"):
        read_extra(f"@{tmp_path / 'b.yaml'}")


def test_what_is_missing_says_how_it_is_installed():
    with pytest.raises(ConfigError, match=r"an X store needs no_such_module .*: pip install 'rootcellar\[x\]'"):
        need("no_such_module", "rootcellar[x]", "an X store")


def test_secrets_are_never_shown():
    extra = {"url": "rediss://me:pass@host:1", "password": "pass", "stores": [{"secret_access_key": "pass"}], "n": 1}
    extra |= {"session_token": "pass", "prefetch_timeout_per_ki_token": 0.1, "user": None}
    shown = {"url": "rediss://...@host:1", "password": "...", "stores": [{"secret_access_key": "..."}], "n": 1}
    shown |= {"session_token": "...", "prefetch_timeout_per_ki_token": 0.1, "user": None}
    assert hide(extra) == shown
    assert json.loads(shown_extra(json.dumps(extra))) == shown
    assert shown_extra("@/etc/store.json") == "@/etc/store.json"
    assert shown_extra('{"password": "pass"') == "..."
    assert shown_extra(None) is None
    assert hide({"url": "redis://:p@ss:w@rd@host:1/0"}) == {"url": "redis://...@host:1/0"}
    assert hide({"token": "pass", "api_key": "pass", "tokens": 1}) == {"token": "...", "api_key": "...", "tokens": 1}


@pytest.mark.parametrize("text", ["a: 1\npass: {pass\n", "pass: pass: pass", "\tpass: 1"])
def test_what_is_wrong_with_a_file_is_said_without_what_is_in_it(tmp_path, text):
    (tmp_path / "store.yaml").write_text(text)
    with pytest.raises(ConfigError, match="is no yaml") as raised:
        read_extra(f"@{tmp_path / 'store.yaml'}")
    assert "pass:" not in str(raised.value)
    assert "{pass" not in str(raised.value)


def test_a_file_with_a_date_that_there_is_not_is_no_yaml(tmp_path):
    (tmp_path / "store.yaml").write_text("day: 2026-13-45")
    with pytest.raises(ConfigError, match="is no yaml: month must be"):
        read_extra(f"@{tmp_path / 'store.yaml'}")


def test_a_server_that_repeats_what_it_does_not_know_tells_nobody_the_password():
    said = b"-ERR unknown command 'AUTH', with args beginning with: 'open sesame'\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            with listening.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(said)

        answering = threading.Thread(target=answer)
        answering.start()
        url = f"redis://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"unknown command 'AUTH'.*'...'") as raised:
            open_store("redis", {"url": url, "password": "open sesame"}, "")
        answering.join()
    assert "sesame" not in str(raised.value)


def test_nothing_of_a_store_is_imported_before_it_is_chosen():
    """Each is one module of the package, and what that needs comes with it."""
    run = [sys.executable, "-X", "importtime", "-c", "import rootcellar.tiers.stores, rootcellar.engine.storage"]
    said = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120).stderr
    loaded = {line.rpartition("|")[2].strip() for line in said.splitlines()}
    mine = {name.rpartition(".")[2] for name in loaded if name.startswith("rootcellar.tiers.stores.")}
    assert mine == {"registry"}


@pytest.mark.parametrize(
    ("backend", "extra", "said"),
    [
        ("redis", {"url": "http://x"}, "url is not allowed: write redis://host:port/db"),
        ("redis", {"url": "redis://me:secret@x:port"}, "url is not allowed: write redis://host:port/db"),
        ("redis", {"password": 5}, "^password is not allowed: give a string"),
        ("redis", {"ca_certs": "x"}, "begin url with rediss://"),
        ("redis", {"port": 1}, "a redis store has no setting port; it has url"),
        ("redis", {"url": "redis://127.0.0.1:1"}, "the redis store at 127.0.0.1:1 cannot be used: .*refused"),
        ("s3", {}, "bucket=None is not allowed"),
        ("s3", {"bucket": "b", "endpoint_url": "127.0.0.1"}, "endpoint_url is not allowed: write http://host:port"),
        (
            "s3",
            {"bucket": "b", "aws_access_key_id": "secret"},
            "^aws_access_key_id and aws_secret_access_key go together",
        ),
        ("s3", {"bucket": "b", "addressing_style": "x"}, "choose from path, virtual"),
        ("lmcache", {"url": "127.0.0.1:1"}, "write lm://host:port"),
        ("lmcache", {"url": "lm://127.0.0.1:65536"}, "write lm://host:port"),
        ("lmcache", {"url": "lm://[::1]:1"}, "the lmcache store at ::1:1 cannot be used: "),
        ("lmcache", {"url": "redis://me:secret@127.0.0.1:1"}, "write lm://host:port"),
        ("redis", {"url": ["redis://me:secret@127.0.0.1:1"]}, "url=.* is not allowed"),
        ("lmcache", {"namespace": "a@b"}, "at most 60 bytes, without @"),
        ("lmcache", {"url": "lm://127.0.0.1:1"}, "the lmcache store at 127.0.0.1:1 cannot be used: .*refused"),
        ("mooncake", {"master_server_address": "x"}, "write host:port of mooncake_master"),
        ("mooncake", {"master_server_address": "127.0.0.1:65536"}, "write host:port of mooncake_master"),
        ("mooncake", {"master_server_address": "[::1]:1"}, r"has no master at \[::1\]:1: \[Errno (111|99|97)\]"),
        ("mooncake", {"replica_num": 0}, "replica_num=0 is not allowed"),
        ("mooncake", {"master_server_address": "127.0.0.1:1"}, "has no master at 127.0.0.1:1: .*start mooncake_master"),
        ("nixl", {"plugin": "GDS"}, "choose from POSIX, OBJ"),
        ("nixl", {"plugin": "OBJ"}, "bucket=None is not allowed"),
        ("nixl", {"plugin": "OBJ", "bucket": "b", "endpoint_override": "x:1"}, "write http://host:port"),
        ("nixl", {"plugin": "OBJ", "bucket": "b", "access_key": "secret"}, "^access_key and secret_key go together"),
        (
            "nixl",
            {"plugin": "OBJ", "bucket": "b", "path": "x"},
            "a nixl store has no setting path; it has plugin, bucket",
        ),
        ("nixl", {"timeout": 1}, "path=None is not allowed"),
        ("hf3fs", {"file_path_prefix": "/proc/x/y"}, "the hf3fs store at '/proc/x/y' cannot be used"),
        ("hf3fs", {"file_path_prefix": "x", "numjobs": 0}, "numjobs=0 is not allowed"),
        ("aibrix", {"python": "/no/python", "path": "x"}, "'/no/python' is not there: .* pip install aibrix-kvcache"),
    ],
)
def test_what_is_wrong_with_a_store_of_others_is_said(backend, extra, said):
    with pytest.raises(ConfigError, match=said) as raised:
        open_store(backend, extra, "")
    assert "secret@" not in str(raised.value)


def test_lmcache_is_chosen_as_sglangs_users_do(tmp_path):
    (tmp_path / "lmcache.yaml").write_text("chunk_size: 256\nremote_url: lm://127.0.0.1:1\n")
    with pytest.raises(ConfigError, match=r"the lmcache store at 127.0.0.1:1 cannot be used"):
        open_store("lmcache", {"config_file": str(tmp_path / "lmcache.yaml")}, "")
    tiers = {"enable_hierarchical_cache": True}
    assert EngineConfig(model_path="x", enable_lmcache=True, lmcache_config_file="y", **tiers).enable_lmcache
    for wrong, said in (
        ({"enable_lmcache": True}, "enable_lmcache keeps what host memory holds"),
        ({"enable_lmcache": True, "hicache_storage_backend": "file", **tiers}, "leave one of the two out"),
        ({"lmcache_config_file": "y", **tiers}, "of no use without enable_lmcache"),
    ):
        with pytest.raises(ConfigError, match=said):
            EngineConfig(model_path="x", **wrong)
