"""Makes ``tests/checkpoints.py`` importable from every test and offers one tiny model folder to all."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 checkpoint with a tokenizer, 2 layers, vocabulary 512; do not write into it."""
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("models") / "tiny", tokenizer=True)
