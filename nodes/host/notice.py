"""A line of text on the node that is running."""

from comfy_execution.utils import get_executing_context

_nodes: set[str] = set()  # the frontend keeps the text until another one comes
_lines: dict[str, tuple[str, list[str]]] = {}  # what each node said, and in which run


def show_notice(text: str):
    """Show `text` on the running node; "" takes away an earlier run's. Outside of a run, do nothing."""
    context = get_executing_context()
    if context is None or not (text or context.node_id in _nodes):
        return

    from server import PromptServer

    server = PromptServer.instance
    server.send_progress_text(text or " ", context.node_id, server.client_id)
    if text:
        _nodes.add(context.node_id)
    else:
        _nodes.discard(context.node_id)


def add_notice(text: str):
    """Show `text` on the running node, below what it said in this run; an earlier run's goes."""
    context = get_executing_context()
    if context is None:
        return
    run, lines = _lines.get(context.node_id, ("", []))
    if run != context.prompt_id:
        lines = []
    elif not text or text in lines:
        return
    if text:
        lines.append(text)
    _lines[context.node_id] = context.prompt_id, lines
    show_notice("\n".join(lines))
