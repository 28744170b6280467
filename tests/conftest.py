"""Makes ``tests/checkpoints.py`` importable from every test, offers a tiny model folder to all, sets hypothesis up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from checkpoints import make_checkpoint

# A loaded machine is no bug. In CI a change is judged by the same examples every time; new ones are looked for at
# everybody's desk and at night (make fuzz).
settings.register_profile("desk", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 checkpoint with a tokenizer, 2 layers, vocabulary 512; do not write into it."""
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("models") / "tiny", tokenizer=True)
