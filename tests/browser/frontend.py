"""ComfyUI's own frontend in Debian's Chromium: opens an example workflow, presses Run, sees the picture."""

import shutil
from contextlib import contextmanager
from typing import NamedTuple

from server import FOLDER

# What a fresh ComfyUI itself writes to the console, this pack or none.
HOST_NOISE = (
    "ComfyApp graph accessed before initialization",
    # The frontend asks other sites for the sizes of missing models; this server forbids it.
    "Content Security Policy",
    # Judged by its address instead, in _answered.
    "Failed to load resource",
)
# Files of the user that a fresh ComfyUI asks for and does not have.
HOST_ABSENT = ("/user.css", "/api/userdata")


def chromium() -> str | None:
    """Playwright's own download is not asked for: the distribution's browser serves."""
    return shutil.which("chromium") or shutil.which("chromium-headless-shell")


class Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float

    def overlaps(self, other: "Box") -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )

    def holds(self, other: "Box") -> bool:
        return (
            self.x <= other.x
            and self.y <= other.y
            and other.x + other.width <= self.x + self.width
            and other.y + other.height <= self.y + self.height
        )


class Frontend:
    """A page of a server; `problems` holds errors in its console, and answers of 400 and above."""

    def __init__(self, page, address: str):
        self.page, self.address, self.problems = page, address, []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._heard)
        page.on("response", self._answered)

    def _heard(self, message):
        if message.type == "error" and not any(noise in message.text for noise in HOST_NOISE):
            self.problems.append(message.text)

    def _answered(self, response):
        path = response.url.removeprefix(self.address)
        # A help page is asked for in the user's language first, then in the pack's own.
        if response.status >= 400 and not path.startswith(HOST_ABSENT) and not path.endswith("/en.md"):
            self.problems.append(f"{response.status} {path}")

    def open(self, workflow: str):
        """As a click in the template browser does."""
        self.page.goto(f"{self.address}/?template={workflow}&source={FOLDER}")
        # At first the frontend shows a workflow of its own.
        self.page.wait_for_function(
            "name => window.app?.extensionManager?.workflow?.activeWorkflow?.filename === name",
            arg=workflow,
            timeout=60_000,
        )
        # The frontend looks for missing models once the graph stands.
        self.page.wait_for_load_state("networkidle")

    def to_prompt(self, workflow: dict) -> dict:
        """What Run sends of a workflow that somebody saved, by the nodes' numbers."""
        return self.page.evaluate(
            "async workflow => (await app.loadGraphData(workflow), (await app.graphToPrompt()).output)",
            workflow,
        )

    def find(self, words: str, name: str) -> bool:
        """Whether the search offers a node of this name within some seconds."""
        asked = self.page.locator("input[role=combobox]")
        for _ in range(20):  # a slow machine takes two clicks for one and one
            if asked.is_visible():
                break
            self.page.evaluate("() => app.graph.clear()")
            self.page.mouse.dblclick(800, 450)
            self.page.wait_for_timeout(1000)
        offered = self.page.get_by_test_id("result-item")
        asked.fill("no node is called so")
        offered.first.wait_for(state="detached", timeout=20_000)  # what an earlier search has found
        asked.fill(words)
        for _ in range(40):
            self.page.wait_for_timeout(500)
            if any(text.splitlines()[0] == name for text in offered.all_inner_texts()):
                return True
        return False

    def nodes(self) -> list[dict]:
        """Each node's type, and whether the frontend knows it."""
        return self.page.evaluate(
            "() => app.graph.nodes.map(node =>"
            " ({type: node.type, known: node.type in LiteGraph.registered_node_types}))"
        )

    def replace_all(self):
        """Presses Replace All, where the frontend lists the nodes that it does not know."""
        self.page.get_by_role("button", name="View details").click()
        self.page.get_by_role("button", name="Replace All").click()
        self.page.wait_for_timeout(1000)

    def missing_models(self) -> str:
        """The text in which the frontend names the files that a workflow needs and offers them."""
        self.page.get_by_role("button", name="View details").click()
        self.page.get_by_text("Missing Models").first.wait_for(timeout=20_000)
        return self.page.locator("body").inner_text()

    def load(self, workflow: str):
        """Into the page that is open, without loading the frontend again."""
        self.page.evaluate(
            """async ([folder, name]) => {
                const answer = await fetch(`/api/workflow_templates/${folder}/${name}.json`)
                await app.loadGraphData(await answer.json(), true, true, name)
            }""",
            [FOLDER, workflow],
        )

    def _settle(self):
        """Waits until the frontend has drawn the nodes, which changes their sizes."""
        sizes, before = "() => String(app.graph.nodes.map(node => [...node.size]))", None
        while before != (now := self.page.evaluate(sizes)):
            before = now
            self.page.wait_for_timeout(500)

    def boxes(self) -> list[tuple[str, Box]]:
        """Each node's type and number, and the box in which it is drawn, title bar included, in the graph's
        pixels."""
        self._settle()
        measured = self.page.evaluate(
            """() => {
                const {scale, offset} = app.canvas.ds
                const {x, y} = app.canvas.canvas.getBoundingClientRect()
                return app.graph.nodes.map(node => {
                    const element = document.querySelector(`[data-node-id="${node.id}"]`)
                    const name = `${node.type} ${node.id}`
                    if (!element) return [name, [...node.boundingRect]]
                    const shown = element.getBoundingClientRect()
                    return [name, [
                        (shown.x - x) / scale - offset[0], (shown.y - y) / scale - offset[1],
                        shown.width / scale, shown.height / scale,
                    ]]
                })
            }"""
        )
        return [(title, Box(*box)) for title, box in measured]

    def groups(self) -> list[tuple[str, Box]]:
        measured = self.page.evaluate("() => app.graph.groups.map(one => [one.title, [...one.boundingRect]])")
        return [(title, Box(*box)) for title, box in measured]

    def note(self) -> tuple[float, float]:
        """The height of the note's text, and the height that the note has for it."""
        # Zoomed out, the classic frontend draws no text.
        self.page.evaluate(
            """() => {
                const [x, y] = app.graph.nodes.find(node => node.type === "MarkdownNote").pos
                app.canvas.ds.scale = 1
                app.canvas.ds.offset = [300 - x, 300 - y]
                app.canvas.setDirty(true, true)
            }"""
        )
        measured = self.page.wait_for_function(
            """() => {
                const note = app.graph.nodes.find(node => node.type === "MarkdownNote")
                const drawn = document.querySelector(`[data-node-id="${note.id}"] .comfy-markdown-content`)
                const box = drawn ?? note.widgets[0].element
                const lines = [...(drawn ?? box.querySelector(".tiptap")).children]
                const [first, last] = [lines[0], lines.at(-1)].map(line => line.getBoundingClientRect())
                const height = last.bottom - first.top
                return height > 0 && [height, box.getBoundingClientRect().height]
            }""",
            timeout=20_000,
        )
        return tuple(measured.json_value())

    def run(self, steps: int | None = None, seconds: int = 480):
        """Presses Run and waits until Save Image shows a picture, whose (width, height) it gives. steps: in
        place of the workflow's own."""
        if steps:
            self.page.evaluate(
                """steps => app.graph.nodes.flatMap(node => node.widgets ?? [])
                    .filter(widget => widget.name === "steps").forEach(widget => { widget.value = steps })""",
                steps,
            )
        self.page.get_by_test_id("queue-button").click()
        shown = self.page.wait_for_function(
            """() => {
                const picture = app.graph.nodes.find(node => node.type === "SaveImage").imgs?.[0]
                return picture?.naturalWidth > 0 && [picture.naturalWidth, picture.naturalHeight]
            }""",
            timeout=seconds * 1000,
        )
        return tuple(shown.json_value())

    def help(self, node_type: str) -> str:
        """The text of a node's help page, opened by its (i) button."""
        button = self.page.get_by_test_id("info-button")
        # Soon after opening, the frontend moves the graph so that all of it is seen.
        for _ in range(10):
            self._click_title(node_type)
            self.page.wait_for_timeout(1000)
            if button.is_visible():
                break
        button.click(timeout=1000)
        shown = self.page.locator(".node-help-content h1")
        shown.first.wait_for(timeout=20_000)
        return self.page.locator(".node-help-content").inner_text()

    def _click_title(self, node_type: str):
        x, y = self.page.evaluate(
            """type => {
                const [x, y] = app.graph.nodes.find(node => node.type === type).pos
                const box = app.canvas.canvas.getBoundingClientRect()
                const [left, top] = app.canvas.convertOffsetToCanvas([x + 60, y - 15])
                return [box.x + left, box.y + top]
            }""",
            node_type,
        )
        self.page.mouse.click(x, y)


@contextmanager
def browsing():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Inside containers Chromium's sandbox cannot start; the only page it opens is this server's.
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@contextmanager
def frontend(browser, address: str, scale: float = 1):
    page = browser.new_page(viewport={"width": 1600, "height": 900}, device_scale_factor=scale)
    yield Frontend(page, address)
    page.close()
