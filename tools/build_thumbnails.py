"""The .jpg beside each example workflow: the pictures that it saves with the demo model, in the real host.

    python tools/build_thumbnails.py path/to/ComfyUI

Workflows that need downloads run with the demo in place of them, and their picture says so.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from comfy_cli.workflow_to_api import convert_ui_to_api
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from server import Server, with_the_demo  # noqa: E402

# What the demo understands, in place of the prompts that were written for Sigma.
PROMPTS = {
    "fast_1024": "a yellow triangle on a blue background",
    "sigma_1024_in_8_gb": "a blue star on a yellow background",
    "sigma_4_bit_t5": "a white square on a black background",
    "sigma_controlnet": "a large white star on a green background",
    "sigma_few_step": "a large red circle on a white background",
    "sigma_lora": "a yellow star on a red background",
    "sigma_two_stage": "a green circle on a white background",
    "sigma_2k": "a white star on a purple background",
    "sigma_4k_wallpaper": "a small yellow square in the top right on a blue background",
    "sigma_under_2_gb": "an orange triangle on a green background",
    "sigma_under_4_gb": "a pink square to the left of a blue star on a white background",
    "sigma_4k_kv_compression": "a blue square on a yellow background",
}
GAP, LABEL = 8, 22


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("host", type=Path, help="the folder that holds custom_nodes")
    parser.add_argument("names", nargs="*", help="of the workflows, in place of all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        server = Server(arguments.host, Path(base))
        try:
            object_info = server.get("/object_info")
            for workflow in sorted((ROOT / "example_workflows").glob("*.json")):
                if arguments.names and workflow.stem not in arguments.names:
                    continue
                written = json.loads(workflow.read_text(encoding="utf-8"))
                prompt = convert_ui_to_api(written, object_info)
                with_the_demo(prompt)
                for node in prompt.values():
                    if workflow.stem in PROMPTS and node["class_type"] == "PixArtSigmaTextEncode":
                        node["inputs"]["positive"] = PROMPTS[workflow.stem]
                run = server.wait(server.submit(prompt), seconds=3600)
                if run.status != "success":
                    raise SystemExit(f"{workflow.name}: {run.error}")
                pictures = [
                    Image.fromarray(picture)
                    for key, node in prompt.items()
                    if node["class_type"] == "SaveImage"
                    for picture in server.pictures(run, key)
                ]
                sheet(pictures, workflow.stem in PROMPTS).save(workflow.with_suffix(".jpg"), quality=88)
        finally:
            server.stop()


def sheet(pictures: list[Image.Image], labelled: bool) -> Image.Image:
    """The pictures in a row."""
    height = max(picture.height for picture in pictures)
    width = sum(picture.width + GAP for picture in pictures) - GAP
    row, x = Image.new("RGB", (width, height), "white"), 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width + GAP
    if labelled:
        draw = ImageDraw.Draw(row)
        draw.rectangle((0, height - LABEL, width, height), fill="white")
        draw.text(
            (6, height - LABEL + 2),
            "drawn by the demo model",
            fill="black",
            font=ImageFont.load_default(14),
        )
    return row


if __name__ == "__main__":
    main()
