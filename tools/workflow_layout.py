"""Where a workflow's nodes stand: a column per stage, read from left to right and from top to bottom.

A node's height is at least that to which the frontend would stretch it, in pixels of the graph. The numbers
were measured in ComfyUI's classic frontend and in Nodes 2.0, of which a node takes the larger; tests/browser
measures the nodes again.
"""

import math

WIDTH = 320
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
TITLE = 30
SLOT = 20
TEXT_BOX = 54
# What Nodes 2.0 has below the widgets: the pack's name, and a button for advanced inputs or a missing file.
PACK_NAME, BUTTON = 24, 24
# More than the least: of a text box for a longer prompt, of a picture, and of a shown text.
MORE_TEXT = 42
PICTURE = 320
# What a node may grow by later: a line that it shows after a run, or its advanced inputs, unfolded.
GROWTH = 64
BETWEEN_NODES = GROWTH + TITLE + 16
BETWEEN_GROUPS, GROUP_MARGIN = 40, 16
# A group's own title, and the name of its pack above a node.
GROUP_TITLE, BADGE = 36, 24
# Of a note: widest letters in a line of text, height of a line, and what surrounds the text.
LETTER, LINE, AROUND = 5.4, 16, 28
NOTE_WIDTH = 480


def is_widget(declared, options: dict) -> bool:
    return isinstance(declared, list) or options.get("widgetType", declared) in WIDGETS


def node_height(kind: str, info: dict, linked: set[str], may_lack_a_file: bool) -> int:
    """Of a node as /object_info describes it, without its title. `linked` are inputs that have a link."""
    inputs = {
        name: (declared, options[0] if options else {})
        for part in ("required", "optional")
        for name, (declared, *options) in info["input"].get(part, {}).items()
    }
    widgets = [entry for entry in inputs.values() if is_widget(*entry)]
    # Nodes 2.0 folds advanced inputs away, except those with a link.
    shown = [
        inputs[name]
        for name, (declared, options) in inputs.items()
        if is_widget(declared, options) and (name in linked or not options.get("advanced"))
    ]
    nodes_2 = sum(map(_height_in_nodes_2, shown))
    nodes_2 += PACK_NAME if info["python_module"].startswith("custom_nodes.") else 0
    nodes_2 += BUTTON if may_lack_a_file or any(options.get("advanced") for _, options in widgets) else 0
    height = 14 + SLOT * max(len(inputs) - len(widgets), len(info["output"]), 1)
    height += max(sum(map(_height_in_classic, widgets)), nodes_2)
    height += MORE_TEXT * sum(bool(options.get("multiline")) for _, options in widgets)
    return height + (PICTURE if kind in ("LoadImage", "SaveImage", "PreviewImage", "PreviewAny") else 0)


def _height_in_classic(widget: tuple) -> int:
    _, options = widget
    if options.get("multiline"):
        return TEXT_BOX
    return 48 if options.get("control_after_generate") else 24


def _height_in_nodes_2(widget: tuple) -> int:
    declared, options = widget
    if options.get("multiline"):
        return TEXT_BOX + 14
    return 36 if declared == "STRING" else 28


def note_height(text: str) -> int:
    """Of a note of NOTE_WIDTH with this text, without its title."""
    letters = (NOTE_WIDTH - 24) / LETTER
    lines = sum(max(1, math.ceil(len(paragraph) / letters)) for paragraph in text.split("\n"))
    return max(88, LINE * lines + AROUND)


def place(columns: dict[str, tuple[int, list[str]]], heights: dict[str, int]):
    """The box [x, y, width, height] of each node, without its title, and the group of each column.

    `columns` has the width of each column and its nodes, by the column's title.
    """
    boxes, groups, x = {}, [], 0
    for number, (title, (width, names)) in enumerate(columns.items(), start=1):
        y = GROUP_TITLE + BADGE + TITLE
        for name in names:
            boxes[name] = [x, y, width, heights[name]]
            y += heights[name] + BETWEEN_NODES
        bottom = y - TITLE
        groups.append(
            {
                "id": number,
                "title": f"{number}. {title}",
                "bounding": [x - GROUP_MARGIN, 0, width + 2 * GROUP_MARGIN, bottom],
                "color": "#3f789e",
                "font_size": 24,
                "flags": {},
            }
        )
        x += width + 2 * GROUP_MARGIN + BETWEEN_GROUPS
    return boxes, groups


def in_reading_order(columns: dict[str, tuple[int, list[str]]], links: list[tuple[str, str]]):
    """Raises ValueError if a link leads to the left, or up in a column."""
    names = [name for _, column in columns.values() for name in column]
    for origin, target in links:
        if names.index(origin) >= names.index(target):
            raise ValueError(f"{target} stands before {origin}, which it needs.")
