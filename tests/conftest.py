"""Makes ``tests/checkpoints.py`` importable from every test, offers a tiny model folder to all, sets up what all use.

Compiling is most of what the suite costs, so compiled programs are kept in ``build/`` between tests, workers, processes
that tests start, and runs. By day XLA compiles in a hurry (``HASTY``): programs are the same, their instructions are
not. At night and beside transformers (``make fuzz``, ``make test-reference``) it compiles as it does for users.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from checkpoints import make_checkpoint
from wide import IDLE, idle_rows, is_wide

COMPILED = Path(__file__).parents[1] / "build" / "tests"
"""Where compiled programs are kept; ``make clean`` forgets them."""
KEEP_ALL = {
    "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
HASTY = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
"""By day: without LLVM's optimisations, by the emitters that write less code, in one piece; a third of the time."""

SLOW = (
    "test_recurrent.py", "test_tensor_parallel.py", "test_hybrid.py", "test_equivalence.py", "test_process.py",
    "test_shared_pool.py", "test_safety.py", "test_lifecycle.py", "test_memory.py", "test_golden.py",
    "test_attention.py", "test_mutations.py", "test_fuzz.py", "test_examples.py", "test_docs.py", "test_sizes.py",
    "test_starting.py", "test_page.py", "test_access.py", "test_grammar.py", "test_control.py", "test_connections.py",
    "test_native.py",
)  # fmt: skip
"""The files that take longest: they begin first, so that no worker has one of them left at the end."""

# A loaded machine is no bug. In CI a change is judged by the same examples every time; new ones are looked for at
# everybody's desk and at night (make fuzz).
settings.register_profile("desk", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports JAX: what it reads from the environment, which processes of tests inherit."""
    for name, value in KEEP_ALL.items():
        os.environ.setdefault(name, value)
    if config.option.markexpr not in ("reference", "clients"):
        # Nobody is asked over TLS: reading all certificates would cost every HTTP client 40 ms.
        os.environ.pop("SSL_CERT_FILE", None)
        os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)
    if config.option.markexpr not in ("long", "reference", "clients"):
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = " ".join([flags, *(f for f in HASTY if f.split("=")[0] not in flags)]).strip()


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what ``make test`` leaves to others; then in the order of ``SLOW``, then as they were found."""
    if not any("::" in word for word in config.args) and not config.getoption("lf", False):
        config.stash[IDLE] = idle_rows(item.nodeid for item in items)
    for item in items:
        if is_wide(item.nodeid):
            item.add_marker("wide")
    turn = {name: i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: turn.get(item.path.name, len(turn)))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 checkpoint with a tokenizer, 2 layers, vocabulary 512; do not write into it."""
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("models") / "tiny", tokenizer=True)
