"""The documentation: each curl line of the guides works, and every route is in docs/serving.md."""

import re
import subprocess
from pathlib import Path

import jax.numpy as jnp
import pytest

from rootcellar.server.app import create_app, routers
from rootcellar.server_config import ServerConfig
from rootcellar.transfer.wires.arrays import Arrays
from serving import Server

DOCS = Path(__file__).parents[2] / "docs"
LINES, *OTHERS = (
    re.findall(r"^curl .*$", (DOCS / name).read_text(encoding="utf-8"), re.MULTILINE)
    for name in ("serving.md", "index.md", "agents.md")
)
ENDLESS = 28  # curl's status when its time is up


@pytest.fixture(scope="module")
def server():
    with Server("--enable-hierarchical-cache") as server:
        yield server


@pytest.fixture(scope="module")
def trainer():
    """A trainer that offers a tensor: its port, and the number."""
    arrays = Arrays("127.0.0.1")
    return arrays.port, arrays.offer([jnp.ones(192)])


@pytest.mark.parametrize(
    "line",
    [*LINES, *(line for lines in OTHERS for line in lines)],
    ids=lambda line: re.search(r":30000(/[^' ]*)", line)[1],
)
def test_every_curl_line_works(server, trainer, line, tmp_path_factory):
    """In the order of the page: what is released there is resumed there."""
    script = 'curl() { command curl --silent --show-error --fail-with-body "$@"; }\n'
    line = line.replace("/tmp/rootcellar-pages", str(tmp_path_factory.getbasetemp() / "pages"))
    port, number = trainer
    line = line.replace('"master_port": 8477', f'"master_port": {port}').replace('"number": 0', f'"number": {number}')
    script += line.replace("http://127.0.0.1:30000", server.url)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == (ENDLESS if "/feed" in line else 0), done.stdout + done.stderr
    assert done.stdout


def test_every_route_is_documented_with_a_line(engine):
    state = create_app(engine, ServerConfig()).state.server
    paths = {route.path for router in routers(state) for route in router.routes}
    routes = {path for path in paths if not path.startswith("/page/")}
    assert len(routes) > 35
    tried = {re.search(r":30000(/[^'? ]*)", line)[1] for line in LINES}
    named = {re.sub(r"\{.*\}", "demo", path) for path in routes}
    assert named - tried == set()
