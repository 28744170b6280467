"""The rules of the house: who may import whom, what importing costs, and how sources are kept."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rootcellar
from rootcellar.cache.api import PrefixCache
from wide import IDLE, WIDE, idle_rows

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "rootcellar"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OTHERS = sorted(p for p in PACKAGE.rglob("*") if p.suffix in {".cc", ".h", ".inc", ".js", ".css", ".html"})
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAX_LINES = 500
MAX_FUNCTION_LINES = 80


def _id(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


# --- imports ----------------------------------------------------------------------------------------------------------


def test_imports_fall():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def _modules_loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "statement",
    [
        "import rootcellar",
        "import rootcellar.cache",
        "import rootcellar.config",
        "import rootcellar.cli",
        "import rootcellar.tiers.stores.file",
    ],
)
def test_importing_the_values_and_the_cache_loads_nothing_heavy(statement):
    heavy = {"jax", "jaxlib", "ml_dtypes", "scipy", "torch", "tokenizers", "safetensors", "rich", "matplotlib"}
    heavy |= {"fastapi", "starlette", "uvicorn", "pydantic", "orjson", "prometheus_client", "llguidance"}
    assert not _modules_loaded_by(statement) & heavy


def test_the_engine_is_loaded_when_its_name_is_used_and_speaks_no_http():
    loaded = _modules_loaded_by("import rootcellar; rootcellar.Engine")
    assert "jax" in loaded
    assert not loaded & {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"}


def test_every_public_name_is_there_and_others_are_not():
    assert all(getattr(rootcellar, name) is not None for name in rootcellar.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = rootcellar.Motor


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_files_and_functions_stay_short_enough_to_read(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES, "split it along its nouns"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.body[0].lineno
            assert length <= MAX_FUNCTION_LINES, f"{node.name} is {length} lines long"


@pytest.mark.parametrize("path", OTHERS, ids=_id)
def test_files_in_other_languages_too(path):
    assert path.read_text(encoding="utf-8").count("\n") <= MAX_LINES, "split it along its nouns"


def _undocumented(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    """The public functions and classes directly or deeper in `node` that have no docstring."""
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        accessor = any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in child.decorator_list)
        if ast.get_docstring(child) is None and not accessor:
            yield prefix + child.name
        if isinstance(child, ast.ClassDef):
            yield from _undocumented(child, f"{prefix}{child.name}.")


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_every_public_name_has_a_docstring(path):
    """The verbs of the two cores have theirs in ``cache/api.py``, once."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    elsewhere = set(vars(PrefixCache)) if _id(path) in ("cache/native.py", "cache/radix.py") else set()
    assert not [name for name in _undocumented(tree, "") if name.rpartition(".")[2] not in elsewhere]
    assert ast.get_docstring(tree) is not None or not tree.body


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_nothing_is_probed_for_by_name(path):
    """What an object has is known from its type; probing hides a missing kind until it runs."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    probes = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "hasattr"]
    assert not [probe.lineno for probe in probes]


def _types_of(path: Path) -> Iterator[tuple[str, str]]:
    """Name and meaning of each public class and type alias of a module: a class is itself, an alias what it says."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            yield node.name, f"class of {_id(path)}"
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name[0].isupper() and not name.isupper():
                yield name, ast.unparse(node.value)


def test_no_two_types_of_the_package_have_one_name():
    """One word per concept; docs/architecture.md has the table."""
    meanings: dict[str, set[str]] = {}
    for path in SOURCES:
        for name, meaning in _types_of(path):
            meanings.setdefault(name, set()).add(meaning)
    assert not {name: each for name, each in meanings.items() if len(each) > 1}


def test_files_that_the_documents_name_are_there():
    folders = (ROOT / name for name in ("src", "tests", "docs", "scripts", "benchmarks", "examples", "deploy"))
    paths = [*ROOT.glob("*"), *(path for folder in folders for path in folder.rglob("*"))]
    there = "".join(f"{path.as_posix()}\n" for path in paths)
    for document in [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]:
        if document.name == "CHANGELOG.md":  # it tells of what was, too
            continue
        named = re.findall(r"`([\w./-]+\.(?:py|cc|h|toml|svg|md))`", document.read_text(encoding="utf-8"))
        assert not [name for name in named if f"/{name}\n" not in there], document.name


# --- the project file, the lock and the wheel -------------------------------------------------------------------------


def test_tests_that_the_documents_name_are_there():
    there = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    for document in (ROOT / "docs").glob("*.md"):
        named = set(re.findall(r"`(test_\w+)`", document.read_text()))
        assert named <= there, document.name


def test_what_is_left_to_others_is_there():
    """No row of ``tests/wide.py`` names a test that has gone."""
    for path, tests in WIDE.items():
        body = ast.walk(ast.parse((ROOT / "tests" / path).read_text()))
        assert {name.split("::")[-1] for name in tests} <= {n.name for n in body if isinstance(n, ast.FunctionDef)}


def test_what_is_left_to_others_leaves_something_out(request):
    """Among what was collected; a row whose parameters were renamed would give its tests back unseen."""
    some = ["tests/cache/test_fuzz.py::test_both_cores_do_the_same[1]", "tests/cache/test_fuzz.py::test_others"]
    assert idle_rows(some) == ["cache/test_fuzz.py::test_thousands_of_steps_by_seed"]
    assert not request.config.stash.get(IDLE, [])


def test_the_version_is_the_same_everywhere():
    assert PROJECT["version"] == rootcellar.__version__
    assert f"## [{rootcellar.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def _pins(name: str) -> set[str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def test_what_runs_is_part_of_what_is_tested_and_nothing_more_than_it_needs():
    assert _pins("run.txt") < _pins("lock.txt")
    names = {pin.partition("==")[0] for pin in _pins("run.txt")}
    needed, found = {Requirement(text).name for text in [*PROJECT["dependencies"], *EXTRAS["build"]]}, set()
    while needed:
        name = canonicalize_name(needed.pop())
        found.add(name)
        wanted = (Requirement(text) for text in importlib.metadata.requires(name) or [])
        wanted = {canonicalize_name(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}
        needed |= wanted - found
    assert names == found


@pytest.mark.parametrize("name", ["run.txt", "lock.txt", "reference.txt"])
def test_the_lock_pins_everything_and_names_no_machine(name):
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and not line.startswith("-") and "+" not in line for line in pins)


@pytest.mark.parametrize(
    ("variables", "native"),
    [
        pytest.param({"ROOTCELLAR_NO_NATIVE": "1"}, False, marks=pytest.mark.long),
        ({"CXX": "/no/such/compiler"}, False),
        # Compiling takes a minute; `make` has done it once already when it set up the environment.
        pytest.param({}, True, marks=pytest.mark.long),
    ],
    ids=["switched off", "no compiler", "compiler"],
)
def test_the_wheel_builds_with_and_without_a_compiler(tmp_path, variables, native):
    """The package is complete either way; only the C++ part comes and goes."""
    for tool in ("scikit_build_core", "cmake", "ninja"):
        pytest.importorskip(tool, reason="the build's tools come with requirements/lock.txt")
    if native and not _has_compiler():
        pytest.skip("this machine has no C++ compiler")
    clean = {k: v for k, v in os.environ.items() if k not in ("ROOTCELLAR_NO_NATIVE", "CXX")}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    command += [f"-Cbuild-dir={tmp_path / 'build'}", f"--wheel-dir={tmp_path}", str(ROOT)]
    done = subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("rootcellar-*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    for library in ("rootcellar/ops/_native.so", "rootcellar/pools/_copies.so"):
        assert (library in files) is native
    assert any(name.startswith("rootcellar/cache/_core.") and name.endswith(".so") for name in files) is native
    assert {f"rootcellar/{_id(path)}" for path in [*SOURCES, *(PACKAGE / "server" / "page").iterdir()]} <= files
    assert not [name for name in files if name.endswith((".cc", ".h", ".inc"))]


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))
