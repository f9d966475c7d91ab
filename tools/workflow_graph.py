"""A workflow as a short description, and as the frontend saves it."""

from workflow_layout import (
    BETWEEN_GROUPS,
    GROUP_MARGIN,
    NOTE_WIDTH,
    WIDTH,
    in_reading_order,
    is_widget,
    node_height,
    note_height,
    place,
)


class Graph:
    """Nodes by a name of their own, in columns.

    An input is a value, an output of another node as `graph["name", output]`, or a model as `download` gives
    it, which the frontend offers to fetch.
    """

    def __init__(self, note: str):
        self.note, self.nodes, self.models = note, {}, {}
        self.columns: dict[str, tuple[int, list[str]]] = {}

    def column(self, title: str, width: int = WIDTH):
        """What is added from now on stands in this column, below what it has. A new one is on the right."""
        self._column = self.columns.setdefault(title, (width, []))[1]

    def add(self, name: str, kind: str, **inputs):
        self._column.append(name)
        self.models[name] = [value for value in inputs.values() if isinstance(value, dict)]
        values = {key: value["name"] if isinstance(value, dict) else value for key, value in inputs.items()}
        self.nodes[name] = (kind, values)

    def __getitem__(self, key: tuple[str, int]) -> "Link":
        return Link(*key)


class Link:
    def __init__(self, node: str, output: int):
        self.node, self.output = node, output


def download(name: str, url: str, directory: str) -> dict:
    """A model's file name, its address, and its folder in the host's models."""
    return {"name": name, "url": url, "directory": directory}


def to_frontend(graph: Graph, object_info: dict) -> dict:
    """The graph in the format that the frontend saves. ValueError where a link would lead back."""
    numbers = {name: number for number, name in enumerate(graph.nodes, start=1)}
    heights = {}
    for name, (kind, inputs) in graph.nodes.items():
        linked = {key for key, value in inputs.items() if isinstance(value, Link)}
        heights[name] = node_height(kind, object_info[kind], linked, bool(graph.models[name]))
    boxes, groups = place(graph.columns, heights)
    nodes, links, led = [], [], []
    for name, (kind, inputs) in graph.nodes.items():
        node = _node(kind, inputs, object_info[kind])
        node["id"], node["order"] = numbers[name], numbers[name] - 1
        node["pos"], node["size"] = boxes[name][:2], boxes[name][2:]
        if graph.models[name]:
            node["properties"]["models"] = graph.models[name]
        for slot, entry in enumerate(node["inputs"]):
            value = inputs[entry["name"]]
            led.append((value.node, name))
            links.append(
                [len(links) + 1, numbers[value.node], value.output, numbers[name], slot, entry["type"]]
            )
            entry["link"] = len(links)
        nodes.append(node)
    in_reading_order(graph.columns, led)
    for number, origin, output, *_ in links:
        nodes[origin - 1]["outputs"][output]["links"].append(number)
    return {
        "last_node_id": len(nodes) + 1,
        "last_link_id": len(links),
        "nodes": [*nodes, _note(graph.note, len(nodes) + 1)],
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _note(text: str, number: int) -> dict:
    """Above the first column."""
    height = note_height(text)
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [-GROUP_MARGIN, -BETWEEN_GROUPS - height],
        "size": [NOTE_WIDTH, height],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
    }


def _node(kind: str, inputs: dict, info: dict) -> dict:
    sockets, widgets, given = [], [], dict(inputs)
    for part in ("required", "optional"):
        for name in info["input_order"].get(part, []):
            declared, *options = info["input"][part][name]
            options = options[0] if options else {}
            value = given.pop(name, options.get("default"))
            linked = isinstance(value, Link)
            if linked:
                socket = {"name": name, "type": "COMBO" if isinstance(declared, list) else declared}
                sockets.append(socket | ({"widget": {"name": name}} if is_widget(declared, options) else {}))
            if is_widget(declared, options):
                widgets.append(options.get("default") if linked else value)
                if options.get("control_after_generate"):
                    widgets.append("fixed")
    if given:
        raise ValueError(f"{kind} has no input {', '.join(given)}.")
    outputs = [
        {"name": name, "type": "*" if isinstance(declared, list) else declared, "links": []}
        for name, declared in zip(info["output_name"], info["output"], strict=True)
    ]
    return {
        "type": kind,
        "flags": {},
        "mode": 0,
        "inputs": sockets,
        "outputs": outputs,
        "properties": {"Node name for S&R": kind},
        "widgets_values": widgets,
    }
