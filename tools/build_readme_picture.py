"""Draw docs/demo.png: what the demo model makes of eight captions that it draws well, the first seed each.

python tools/build_readme_picture.py
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pixart_sigma import Settings, SigmaPipeline, Ways

CAPTIONS = (
    "a red square to the left of a blue star on a white background",
    "a yellow square on a purple background",
    "a large green triangle",
    "a white star on a black background",
    "a small orange square in the top left on a gray background",
    "a pink square to the left of a cyan star on a brown background",
    "a blue star above a red triangle on a white background",
    "a red square on a blue background",
)
COLUMNS, SIDE, TEXT, GAP = 4, 256, 44, 12
OUT = Path(__file__).parents[1] / "docs" / "demo.png"


def main():
    pipeline = SigmaPipeline.from_path("demo", Ways(device="cpu", release="keep"))
    rows = -(-len(CAPTIONS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + TEXT + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for index, caption in enumerate(CAPTIONS):
        x = GAP + index % COLUMNS * (SIDE + GAP)
        y = GAP + index // COLUMNS * (SIDE + TEXT + GAP)
        sheet.paste(pipeline.generate(Settings(caption, seed=0)).images[0], (x, y))
        draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline=(200, 200, 200))
        draw.multiline_text((x, y + SIDE + 4), wrapped(caption, draw, font), fill=(40, 40, 40), font=font)
    OUT.parent.mkdir(exist_ok=True)
    sheet.save(OUT, optimize=True)


def wrapped(caption: str, draw: ImageDraw.ImageDraw, font) -> str:
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) > SIDE:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


if __name__ == "__main__":
    main()
