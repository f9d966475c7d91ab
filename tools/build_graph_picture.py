"""docs/graph.png: the demo workflow in the real frontend, after it has run.

    python tools/build_graph_picture.py path/to/ComfyUI

Needs Chromium and Playwright, as tests/browser does.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "browser")]
from frontend import browsing, frontend  # noqa: E402
from server import Server  # noqa: E402

# The graph alone, without the frontend's own bars.
PART = {"x": 195, "y": 150, "width": 1222, "height": 645}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("host", type=Path, help="the folder that holds custom_nodes")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "graph.png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        server = Server(arguments.host, Path(base))
        try:
            # Text stays readable in a small picture of a wide graph.
            server.post(
                "/settings", {"Comfy.Minimap.Visible": False, "LiteGraph.Canvas.MinFontSizeForLOD": 0}
            )
            with browsing() as browser, frontend(browser, server.address, scale=1.5) as page:
                page.open("demo_text_to_image")
                page.run()
                page.page.wait_for_timeout(2000)
                page.page.screenshot(path=arguments.out, clip=PART)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
