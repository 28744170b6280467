"""Tests stores on each component, one after the other, in a process of its own that is ended when it takes too long.

python run.py --environments FOLDER --torch ENVIRONMENT [--limit SECONDS] [NAME...] [-- WORDS FOR PYTEST]

What can be had is installed first. Its last lines say of each component what ran, what did not, and why.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from components import COMPONENTS, ENVIRONMENTS_OF, IN_OURS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FAREWELL = 15.0
"""Seconds for putting away what was started, once the time is up."""


def main(words):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which, of {', '.join(COMPONENTS)}; else all")
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--torch", type=Path, required=True, help="an environment that has torch")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    args = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    names = args.names or list(COMPONENTS)
    if unknown := sorted(set(names) - COMPONENTS.keys()):
        parser.error(f"there is no {', '.join(unknown)}: choose from {', '.join(COMPONENTS)}")
    folder, lent = args.environments.resolve(), Path(sys.prefix)
    environments = dict.fromkeys(each for name in names for each in ENVIRONMENTS_OF.get(name, ()))
    prepare = [ROOT / "scripts" / "prepare_stores.sh", folder, lent, args.torch.resolve(), *environments]
    subprocess.run(prepare, cwd=ROOT, check=True)
    rows = []
    with tempfile.TemporaryDirectory() as told:
        for name in names:
            own = folder / ENVIRONMENTS_OF[name][0] / "bin" / "python" if name in IN_OURS else None
            python = own if own is not None and own.exists() else sys.executable
            print(f"--- {name}", flush=True)
            rows.append(tried(name, python, folder, Path(told, name), args.limit, words))
    print()
    for name, good, said in rows:
        print(f"{'' if good else 'FAILED  '}{name}: {said}")
    return 0 if all(good for _, good, _ in rows) else 1


def tried(name, python, folder, told, limit, words):
    """Test one component: its name, whether nothing failed, and what is to be said."""
    more = words[words.index("--") + 1 :] if "--" in words else []
    command = [python, "-m", "pytest", "-m", "stores and not long", HERE, "--component", name, "--told", told, *more]
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"ROOTCELLAR_STORES": str(folder)}, start_new_session=True
    )
    over = ""
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        over, status = f"ended after {limit:g} s; ", 1
        end(process)
    except BaseException:  # whoever started this ends it
        end(process)
        raise
    found = json.loads(told.read_text()) if told.exists() else {}
    counts = ", ".join(f"{count} {what}" for what, count in found.get("counts", {}).items())
    why = "; ".join(found.get("said", []) + found.get("skipped", []))
    version = found.get("version", "did not start")
    said = f"{version}: {over}{counts or 'nothing ran'} in {time.monotonic() - began:.0f} s{why and f' ({why})'}"
    return name, status in (0, NOTHING_COLLECTED), said


NOTHING_COLLECTED = 5
"""Pytest's status where no test was asked for."""


def end(process):
    """End it and all that it started, whatever they do now; politely first."""
    process.send_signal(signal.SIGINT)
    below = descendants(process.pid)
    try:
        process.wait(FAREWELL)
    except subprocess.TimeoutExpired:
        below += descendants(process.pid)
        process.kill()
        process.wait()
    for each in below:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


def descendants(pid):
    listed = subprocess.run(["ps", "-A", "-o", "ppid=,pid="], capture_output=True, text=True, check=True).stdout
    children = {}
    for line in listed.splitlines():
        parent, child = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found[1:]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
