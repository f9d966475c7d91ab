"""Write locales/en/nodeDefs.json from the nodes' own texts, so that translators see every one of them.

    python tools/build_locales.py --object-info http://127.0.0.1:8188/object_info

Needs a running ComfyUI with this pack.
"""

import argparse
import json
from pathlib import Path

from build_workflows import read_object_info

ENGLISH = Path(__file__).parents[1] / "locales" / "en" / "nodeDefs.json"


def texts(info: dict) -> dict:
    """What a translation of one node holds, from its entry in the host's /object_info."""
    inputs = {
        name: {"name": name, "tooltip": options["tooltip"]}
        for part in ("required", "optional")
        for name, (_, options) in info["input"].get(part, {}).items()
    }
    outputs = {
        str(index): {"name": name, "tooltip": tooltip}
        for index, (name, tooltip) in enumerate(
            zip(info["output_name"], info["output_tooltips"], strict=True)
        )
    }
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def build(object_info: dict) -> str:
    """The text of the file, from what the host says about its nodes."""
    nodes = {name: texts(info) for name, info in object_info.items() if name.startswith("PixArtSigma")}
    return json.dumps(nodes, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--object-info", required=True, help="address of the host's /object_info, or a file")
    object_info = read_object_info(parser.parse_args().object_info)
    ENGLISH.write_text(build(object_info), encoding="utf-8")


if __name__ == "__main__":
    main()
