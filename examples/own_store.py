"""A store of one's own: pages as files in a folder. Whatever has these calls is one.

    rootcellar serve --model-path PATH --enable-hierarchical-cache --hicache-storage-backend dynamic \
        --hicache-storage-backend-extra-config \
        '{"module_path": "examples/own_store.py", "class_name": "FolderStore", "path": "/fast/pages"}'

The suite that every store has to pass: pytest --rootcellar-store examples/own_store.py:FolderStore \
    --rootcellar-store-extra-config '{"path": "/tmp/pages"}'
"""

import os
import threading
from pathlib import Path

from rootcellar.tiers.store import check_names


class FolderStore:
    """See ``rootcellar.tiers.store.Store`` for what each call promises."""

    verifies = False  # rootcellar adds a checksum to each page, and checks it

    def __init__(self, settings, _identity):
        self._folder = Path(settings["path"])
        self._folder.mkdir(parents=True, exist_ok=True)

    def has(self, names):
        check_names(names)
        return [(self._folder / name.hex()).exists() for name in names]

    def get(self, names, into):
        check_names(names, into)
        return [self._read(self._folder / name.hex(), view) for name, view in zip(names, into, strict=True)]

    def _read(self, path, view):
        try:
            with open(path, "rb") as file:
                return os.fstat(file.fileno()).st_size == view.nbytes == file.readinto(view)
        except FileNotFoundError:
            return False

    def put(self, names, blocks):
        check_names(names, blocks)
        for name, block in zip(names, blocks, strict=True):
            part = self._folder / f"{name.hex()}.{os.getpid()}.{threading.get_ident()}.part"
            part.write_bytes(block)
            part.replace(self._folder / name.hex())  # whole, or not there
        return [True] * len(names)

    def clear(self):
        pages = [path for path in self._folder.iterdir() if not path.suffix]
        for path in pages:
            path.unlink(missing_ok=True)
        return len(pages)

    def register(self, buffer):
        pass

    def close(self):
        pass
