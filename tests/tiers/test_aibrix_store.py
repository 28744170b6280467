"""The process of AIBrix's store, with a connector in memory; a real one is in ``tests/store_components``."""

import gc
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
from stores import get, name, put

from rootcellar.errors import ConfigError
from rootcellar.tiers.stores import aibrix

CONNECTOR = """
    import os, time

    class Status:
        def __init__(self, fine=True): self.fine = fine
        def is_ok(self): return self.fine
        def is_not_found(self): return not self.fine

    class ConnectorConfig:
        def __init__(self, *_): pass

    class Connector:
        name, pages = "SHFS", {}
        @classmethod
        def create(cls, _): return cls()
        def open(self):
            if os.environ.get("HANGS"):
                time.sleep(600)
            return Status()
        def close(self): pass
        async def exists(self, name): return Status(name in self.pages)
        async def put(self, name, region):
            self.pages[name] = bytes(region)
            return Status()
        async def get(self, name, region):
            fine = name in self.pages
            if fine:
                region[:] = self.pages[name]
            return Status(fine)
"""


@pytest.fixture
def python(tmp_path):
    """An interpreter that has a package of this name, and of torch what is asked of it."""
    package = tmp_path / "aibrix_kvcache"
    (package / "l2").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "l2" / "__init__.py").touch()
    (package / "l2" / "connectors.py").write_text(textwrap.dedent(CONNECTOR))
    (package / "memory.py").write_text("def ExternalMemoryRegion(block, start, length): return block\n")
    (tmp_path / "torch.py").write_text("uint8 = None\ndef frombuffer(block, dtype): return memoryview(block)\n")
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport runpy, sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        'sys.argv = sys.argv[2:]\nrunpy.run_path(sys.argv[0], run_name="__main__")\n'
    )
    program.chmod(0o700)
    return str(program)


def test_it_is_started_again_and_leaves_nothing_open(python, tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        store = aibrix.open_store({"python": python, "path": str(tmp_path / "pages")}, "")
        assert put(store, [1]) == [True]
        assert get(store, 1)
        first = store._process
        first.kill()
        first.wait()
        assert store.has([name(1)]) == [False]  # its memory went with it
        second = store._process
        store.close()
        assert second.poll() is not None
        gc.collect()
    assert not [str(one.message) for one in seen if one.category is ResourceWarning]
    with pytest.raises(ValueError, match="the store is closed"):
        store.has([name(1)])


def test_it_ends_with_whoever_started_it(python, tmp_path):
    store = aibrix.open_store({"python": python, "path": str(tmp_path / "pages")}, "")
    store._process.stdin.close()  # as the system does for a process that was killed
    assert store._process.wait(10) == 0
    store.close()


def test_one_that_hangs_while_it_opens_ends_with_whoever_started_it(python, tmp_path):
    command = [python, "-I", str(aibrix._SIDECAR), str(tmp_path / "socket"), "SHFS", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "HANGS": "1"}) as process:
        process.stdin.close()
        try:
            assert process.wait(10) == 1
        finally:
            process.kill()


def test_one_that_does_not_start_says_why(tmp_path):
    with pytest.raises(
        ConfigError, match=r"(?s)^the aibrix store cannot be used: AIBrix did not start: .*aibrix_kvcache"
    ):
        aibrix.open_store({"python": sys.executable, "path": str(tmp_path)}, "")
