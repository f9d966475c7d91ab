import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from frontend import chromium, frontend  # noqa: E402


@pytest.fixture
def page(server):
    """A fresh page of the real frontend."""
    pytest.importorskip("playwright", reason="no Playwright: pip install playwright")
    if not chromium():
        pytest.skip("no Chromium: apt install chromium")
    with frontend(server.address) as opened:
        yield opened
