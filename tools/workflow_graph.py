"""A workflow as a short description, and as the frontend saves it."""

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
COLUMN, ROW, TOP = 380, 26, 90


class Graph:
    """Nodes by a name of their own.

    An input is a value, an output of another node as `graph["name", output]`, or a model as `download` gives
    it, which the frontend offers to fetch.
    """

    def __init__(self, note: str):
        self.note, self.nodes, self.models = note, {}, {}

    def add(self, name: str, kind: str, **inputs):
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
    """The graph in the format that the frontend saves, laid out from left to right."""
    numbers = {name: number for number, name in enumerate(graph.nodes, start=1)}
    depth: dict[str, int] = {}
    for name, (_, inputs) in graph.nodes.items():
        before = [depth[value.node] for value in inputs.values() if isinstance(value, Link)]
        depth[name] = max(before, default=-1) + 1
    nodes, links, next_row = [], [], {}
    for name, (kind, inputs) in graph.nodes.items():
        node = _node(kind, inputs, object_info[kind])
        node["id"], node["order"] = numbers[name], numbers[name] - 1
        node["pos"] = [COLUMN * depth[name], TOP + next_row.get(depth[name], 0)]
        next_row[depth[name]] = next_row.get(depth[name], 0) + node["size"][1] + 60
        if graph.models[name]:
            node["properties"]["models"] = graph.models[name]
        for slot, entry in enumerate(node["inputs"]):
            value = inputs[entry["name"]]
            links.append(
                [len(links) + 1, numbers[value.node], value.output, numbers[name], slot, entry["type"]]
            )
            entry["link"] = len(links)
        nodes.append(node)
    for number, origin, output, *_ in links:
        nodes[origin - 1]["outputs"][output]["links"].append(number)
    note = {
        "id": len(nodes) + 1,
        "type": "MarkdownNote",
        "pos": [0, TOP - 220],
        "size": [720, 140],
        "flags": {},
        "order": len(nodes),
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [graph.note],
    }
    return {
        "last_node_id": len(nodes) + 1,
        "last_link_id": len(links),
        "nodes": [*nodes, note],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _node(kind: str, inputs: dict, info: dict) -> dict:
    sockets, widgets, given = [], [], dict(inputs)
    for part in ("required", "optional"):
        for name in info["input_order"].get(part, []):
            declared, *options = info["input"][part][name]
            options = options[0] if options else {}
            is_widget = isinstance(declared, list) or options.get("widgetType", declared) in WIDGETS
            value = given.pop(name, options.get("default"))
            linked = isinstance(value, Link)
            if linked:
                socket = {"name": name, "type": "COMBO" if isinstance(declared, list) else declared}
                sockets.append(socket | ({"widget": {"name": name}} if is_widget else {}))
            if is_widget:
                widgets.append(options.get("default") if linked else value)
                if options.get("control_after_generate"):
                    widgets.append("fixed")
    if given:
        raise ValueError(f"{kind} has no input {', '.join(given)}.")
    outputs = [
        {"name": name, "type": "*" if isinstance(declared, list) else declared, "links": []}
        for name, declared in zip(info["output_name"], info["output"], strict=True)
    ]
    texts = sum("\n" in str(value) or len(str(value)) > 24 for value in widgets)
    height = ROW * (len(sockets) + len(widgets)) + 40 + 90 * texts
    if kind in ("SaveImage", "PreviewImage"):
        height += 260
    return {
        "type": kind,
        "size": [320, height],
        "flags": {},
        "mode": 0,
        "inputs": sockets,
        "outputs": outputs,
        "properties": {"Node name for S&R": kind},
        "widgets_values": widgets,
    }
