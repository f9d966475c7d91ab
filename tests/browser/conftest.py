import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from frontend import browsing, chromium, frontend  # noqa: E402


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("playwright", reason="no Playwright: pip install playwright")
    if not chromium():
        pytest.skip("no Chromium: apt install chromium")
    with browsing() as opened:
        yield opened


@pytest.fixture
def page(server, browser):
    """A fresh page of the real frontend."""
    with frontend(browser, server.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def nodes_2(server, browser):
    """One page of Nodes 2.0, the frontend's other way of drawing nodes."""
    server.post("/settings", {"Comfy.VueNodes.Enabled": True})
    with frontend(browser, server.address) as opened:
        opened.open("demo_text_to_image")
        server.post("/settings", {"Comfy.VueNodes.Enabled": False})
        yield opened
