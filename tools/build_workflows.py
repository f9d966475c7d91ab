"""Write example_workflows/*.json in the frontend's format, from demo_workflows.py and sigma_workflows.py.

    python tools/build_workflows.py --object-info http://127.0.0.1:8188/object_info

Needs a running ComfyUI with this pack: which inputs a node has, and in which order, is asked of the host.
"""

import argparse
import json
import urllib.request
from pathlib import Path

from demo_workflows import DEMO_WORKFLOWS
from sigma_workflows import SIGMA_WORKFLOWS
from workflow_graph import to_frontend

REPOSITORY = Path(__file__).parents[1]


def build(object_info: dict) -> dict[str, str]:
    """The text of each file by its name, from what the host says about its nodes."""
    texts = {}
    for workflow in DEMO_WORKFLOWS + SIGMA_WORKFLOWS:
        saved = to_frontend(workflow(), object_info)
        texts[f"{workflow.__name__}.json"] = json.dumps(saved, indent=1, ensure_ascii=False) + "\n"
    return texts


def read_object_info(place: str) -> dict:
    """What the host says about its nodes, from its address or from a file."""
    if not place.startswith("http"):
        return json.loads(Path(place).read_text(encoding="utf-8"))
    with urllib.request.urlopen(place) as answer:
        return json.load(answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--object-info", required=True, help="address of the host's /object_info, or a file")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "example_workflows")
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    for name, text in build(read_object_info(arguments.object_info)).items():
        (arguments.out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
