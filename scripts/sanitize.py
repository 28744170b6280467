"""The C++ parts under AddressSanitizer and UndefinedBehaviorSanitizer: ``make sanitize``.

Builds them with both in ``build/sanitize``. The kernels for CPUs run beside the same written out, at random and with
each instruction set that this processor has (``tests/ops/check_*.cc``); the file store's transfers run beside those of
Python, the cache core in lockstep with Python's. Any bad access and any undefined behaviour ends that with a report.
Needs GCC or Clang with their sanitizer runtimes. The interpreter's own leaks would drown ours, so leaks are not looked
for there; ``tests/cache/test_native_core.py`` counts memory instead.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitize"


def build() -> None:
    tools = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={Path(sys.executable).with_name('ninja')}"]
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DROOTCELLAR_SANITIZE=ON", "--log-level=NOTICE"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "ROOTCELLAR_NO_NATIVE"} | {"PATH": path}
    for command in ([*configure, *tools], ["cmake", "--build", BUILD, "--", "--quiet"]):
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def package() -> Path:
    """A copy of the cache and of ``slotio`` beside what is sanitized, so that nothing installed is taken for that."""
    source, copy = ROOT / "src" / "rootcellar", BUILD / "package" / "rootcellar"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(source / name, copy)
    shutil.copytree(source / "cache", copy / "cache", ignore=shutil.ignore_patterns("__pycache__", "native"))
    (copy / "tiers" / "stores").mkdir(parents=True)
    for name in ("tiers/__init__.py", "tiers/stores/slotio.py"):
        shutil.copy(source / name, copy / name)
    (copy / "tiers" / "stores" / "__init__.py").touch()
    for name, room in (("_core", "cache"), ("_slots", "tiers")):
        for built in BUILD.glob(f"{name}*.so"):
            shutil.copy(built, copy / room)
    return copy.parent


def library(compiler: str, *names: str) -> str:
    """The first of these libraries that the compiler has; empty when it has none."""
    for name in names:
        done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        if os.sep in done.stdout.strip():
            return done.stdout.strip()
    return ""


def runtime() -> str:
    """The sanitizers' library, to be loaded before the interpreter, which was built without; and C++'s, in which the
    sanitizer looks for what throws when it starts."""
    compiler = os.environ.get("CXX", "c++")
    sanitizer = library(compiler, "libasan.so", "libclang_rt.asan.so")
    if not sanitizer:
        sys.exit(f"{compiler} has no AddressSanitizer runtime; install it, or choose a compiler with CXX=...")
    return f"{sanitizer} {library(compiler, 'libstdc++.so.6', 'libc++.so.1')}"


def main() -> None:
    steps, seed = [*sys.argv[1:], *("20000", "0")[len(sys.argv) - 1 :]]
    build()
    for check in ("check_attention", "check_peaks", "check_products", "check_states"):
        subprocess.run([BUILD / check, "25", seed], check=True)
    environment = os.environ | {
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join([str(package()), str(Path(numpy.__file__).parents[1])]),
    }
    environment.pop("ROOTCELLAR_NO_NATIVE", None)
    # -S: an editable install would put its own finder first, and the sanitized core would never be imported.
    python, tests = [sys.executable, "-S"], ROOT / "tests"
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        subprocess.run([*python, tests / "tiers" / "transfers.py", folder], env=environment, check=True)
    subprocess.run([*python, tests / "cache" / "fuzz.py", steps, seed, "lockstep"], env=environment, check=True)


if __name__ == "__main__":
    main()
