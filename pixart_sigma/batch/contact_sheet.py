"""All pictures of a batch, small, on one sheet or several."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..files.picture_files import open_picture, write_picture

SIDE = 192  # pixels of each picture
MOST_COLUMNS, MOST_ROWS = 10, 20
NAME = "contact_sheet"


def write_contact_sheets(files: Sequence[Path], folder: Path) -> list[Path]:
    """Write the pictures of these files into sheets in the folder, in their order, and return the sheets."""
    each = MOST_COLUMNS * MOST_ROWS
    parts = [files[first : first + each] for first in range(0, len(files), each)]
    sheets = []
    for number, part in enumerate(parts, 1):
        path = folder / (f"{NAME}.jpg" if len(parts) == 1 else f"{NAME}_{number}.jpg")
        write_picture(path, _sheet(part))
        sheets.append(path)
    return sheets


def _sheet(files: Sequence[Path]) -> Image.Image:
    columns = min(MOST_COLUMNS, math.ceil(math.sqrt(len(files))))
    rows = math.ceil(len(files) / columns)
    sheet = Image.new("RGB", (columns * SIDE, rows * SIDE), "white")
    for index, file in enumerate(files):
        with open_picture(file) as picture:
            small = picture.convert("RGB")
        small.thumbnail((SIDE - 4, SIDE - 4))
        left, top = index % columns * SIDE, index // columns * SIDE
        sheet.paste(small, (left + (SIDE - small.width) // 2, top + (SIDE - small.height) // 2))
    return sheet
