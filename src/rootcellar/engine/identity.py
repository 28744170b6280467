"""What cached pages are called and whose they are: so that equal names mean equal bytes, whoever says them.

A page's name is chained over its tokens (``cache/digest.py``) and begins with all that changes its bytes:

- the *fingerprint* of the engine: the model's config, its kinds, the cache's dtype and page size;
- which *weights* computed it. A counter would not do, for two training runs' version "1" are different weights, and
  names outlive a process once a store keeps pages. So a checkpoint on disk is called after the content of its files,
  whatever its path and whoever reads it; live arrays after a name that their owner gives, who then answers for it; and
  live arrays without a name after this run alone and the number of the update: nobody else ever says the same;
- the *namespace*: the tenant it was computed for, and the salt and key that the request gave.

A *tenant* is whoever a request is made for. What it caches, what its requests are called and what it pins are its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl, quote

from rootcellar.cache import Kind
from rootcellar.config import EngineConfig
from rootcellar.errors import RequestError
from rootcellar.models.model import ModelConfig

LONGEST_NAME = 256
"""Characters of a name that a caller gives; it comes back in every answer, and is shown wherever its request is."""


FORMAT = 1
"""Of names. What is written down under one format is never read under another."""

_RUN = uuid.uuid4().hex
_updates = itertools.count()
_PIECE = 1 << 22
_REMEMBERED = 4096


def fingerprint(
    model: ModelConfig,
    kinds: Sequence[Kind],
    dtype: str,
    kv_dtype: str,
    page_size: int,
    quantization: str | None = None,
    *,
    fixed: bool = False,
) -> bytes:
    """32 bytes that differ whenever an engine would fill the pages of equal tokens, by equal weights, otherwise.

    ``dtype``: of weights, and what the model computes in but for CPUs; ``kv_dtype``: what the cache holds;
    ``quantization``: of the weights. ``fixed``: whether the last bits count too (``enable_deterministic_inference``).
    """
    alike = replace(model, eos_token_ids=(), bos_token_id=None, dtype="float32")  # of answers, and how it was saved
    said = {
        "format": FORMAT,
        "model": repr(alike),
        "kinds": [[kind.name, kind.rule, kind.span, list(kind.layers)] for kind in kinds],
        "dtype": dtype,
        "kv_cache_dtype": kv_dtype,
        "page_size": page_size,
    }
    if quantization is not None:
        said["quantization"] = quantization
    if fixed:
        said["fixed"] = True
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


def weights_in_files(files: Iterable[Path], memory: Path | None) -> str:
    """Weights in these files: ``"files-"`` and the SHA-256 of their names and contents.

    Reading gigabytes again at each start would cost seconds, so a file's digest is remembered in the file ``memory``
    (None: nowhere) by its size, its time of change to the nanosecond and its inode.
    """
    paths = sorted(files, key=lambda path: path.name)
    with _remembered(memory) as known, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = list(pool.map(lambda path: _digest(path, known), paths))
    rows = [[path.name, digest] for path, digest in zip(paths, digests, strict=True)]
    return "files-" + hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def weights_named(name: str) -> str:
    """Live arrays that their owner calls so."""
    return "named-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def weights_of_this_run() -> str:
    """Live arrays that nobody named: a word that is said once, by this process."""
    return f"run-{_RUN}-{next(_updates)}"


def _digest(path: Path, known: dict[str, str]) -> str:
    stat = path.stat()  # of what a link points to
    key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    if key not in known:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        known[key] = digest.hexdigest()
    return known[key]


@contextlib.contextmanager
def _remembered(memory: Path | None) -> Iterator[dict[str, str]]:
    """Digests of files by what their system says of them, kept for the next time; a memory that fails is no error."""
    known: dict[str, str] = {}
    if memory is not None:
        with contextlib.suppress(OSError, ValueError):
            read = json.loads(memory.read_text(encoding="ascii"))
            known = {str(key): str(value) for key, value in read.items()}
    before = len(known)
    yield known
    if memory is not None and len(known) > before:
        newest = dict(list(known.items())[-_REMEMBERED:])
        with contextlib.suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            part = memory.with_name(f"{memory.name}.{os.getpid()}")
            part.write_text(json.dumps(newest), encoding="ascii")
            part.replace(memory)


def check_name(field: str, value: object) -> str:
    """``value`` as a name; ``RequestError`` when it is none, or one that no line of a log should hold."""
    if not isinstance(value, str):
        raise RequestError(f"{field} must be a string, not {type(value).__name__}")
    if len(value) > LONGEST_NAME:
        raise RequestError(f"{field} has {len(value)} characters: at most {LONGEST_NAME} are allowed")
    if not value.isprintable():
        raise RequestError(f"{field} has a character in it that cannot be printed")
    return value


def namespace(tenant: str, salt: str, extra_key: str) -> str:
    """The namespace of these three fields; empty when all are.

    No two different inputs give one: fields are named, and what stands in a field cannot end it. There is no slash in
    it, so what the weights are, in front of it (``"{weights}/{namespace}"``), is as well apart.
    """
    fields = {"tenant": tenant, "cache_salt": salt, "extra_key": extra_key}
    return "&".join(f"{name}={quote(value, '', errors='surrogatepass')}" for name, value in fields.items() if value)


def read_namespace(config: EngineConfig, tenant: str, salt: str, extra_key: str) -> str:
    """The namespace of what a caller gave, each checked as a name; tenants share one where the settings say so."""
    fields = {"tenant": tenant, "cache_salt": salt, "extra_key": extra_key}
    for field, value in fields.items():
        check_name(field, value)
    return namespace("" if config.share_cache_across_keys else tenant, salt, extra_key)


def tenant_in(key_namespace: str) -> str:
    """The tenant of a namespace as cache keys have it, with what the weights are in front."""
    fields = dict(parse_qsl(key_namespace.rpartition("/")[2], errors="surrogatepass"))
    return fields.get("tenant", "")


def names_of(rid: str | Sequence[str] | None, prompts: int) -> list[tuple[str, ...]]:
    """For each prompt of a call the names that its answers go by, the widest first; none when it was given none.

    A list names each prompt. One name is that of the call: its only prompt has it too, several are ``rid-0`` and so on.

    Raises:
        RequestError: there are not as many names as prompts, or one is no name.
    """
    if rid is None:
        return [()] * prompts
    if isinstance(rid, str):
        check_name("rid", rid)
        return [(rid,)] if prompts == 1 else [(rid, f"{rid}-{i}") for i in range(prompts)]
    if not isinstance(rid, Sequence) or len(rid) != prompts:
        raise RequestError(f"rid must be one str or a list of {prompts}, one for each prompt")
    return [(check_name("rid", name),) for name in rid]
