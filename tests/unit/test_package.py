"""What importing the package costs, and which way its imports point."""

import ast
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pixart_sigma

PACKAGE = Path(pixart_sigma.__file__).parent
PACK = PACKAGE.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
NODES = PACK / "nodes"
SPEAK = ("files/download", "batch/on_ray", "batch/rows", "batch/storage")
NODE_SOURCES = sorted(NODES.rglob("*.py"))
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in SOURCES}

SETTINGS_OBJECTS = ("settings", "ways")
BASE = {
    "adapter_files",
    "aspect_ratio",
    "choices",
    "devices",
    "errors",
    "noise_schedule",
    "prompt_embeds",
    "recipes",
    "schedule_part",
    "setting_checks",
    "settings",
    "speed",
    "table",
}
STAGES = {"sampling", "text", "transformer", "vae"}
# What a folder, or a module beside the folders, may import; the package itself is known to all.
ALLOWED = {
    **{name: BASE for name in BASE},
    "files": BASE,
    "memory": BASE,
    **{name: BASE | {"files", "memory", name} for name in STAGES},  # and never one another
    "components": BASE | {"files", "memory", "text_adapters"} | STAGES,
    "text_adapters": BASE | {"files"} | STAGES,
    "inspection": BASE | {"files"} | STAGES,
    "planner": BASE | {"files", "memory"} | STAGES,
    "refiner": BASE | {"files", "memory"} | STAGES,
    "run_inputs": BASE | {"files", "memory"} | STAGES,
    "runs": BASE | {"files", "memory", "refiner", "run_inputs"} | STAGES,
    "pipeline": BASE | {"files", "memory", "components", "planner", "refiner", "run_inputs", "runs"} | STAGES,
    "batch": BASE | {"files", "memory", "pipeline", "run_inputs", "runs"} | STAGES,
    "studies": BASE | {"files", "memory", "components", "planner", "pipeline", "run_inputs"} | STAGES,
    "cli": BASE
    | {"files", "memory", "components", "inspection", "planner", "pipeline", "studies", "batch"}
    | STAGES,
    "__main__": {"cli"},
}


def imported_names(source: str) -> list[tuple[int, str]]:
    """(level, module) of every import statement; level is the number of leading dots."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def engine_imports(module: str) -> set[str]:
    """The engine's modules that a module imports, also within functions; the package itself is "__init__"."""
    path = MODULES[module]
    package = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parent = [*package[: len(package) + 1 - node.level], *filter(None, [node.module])]
            for alias in node.names:
                name = ".".join([*parent, alias.name])
                found.add(name if name in MODULES else ".".join(parent) or "__init__")
    return found


def test_import_leaves_the_heavy_libraries_alone():
    code = "import json, sys, pixart_sigma; dir(pixart_sigma); print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    roots = {name.partition(".")[0] for name in json.loads(result.stdout)}
    assert not roots & {
        "torch",
        "diffusers",
        "transformers",
        "numpy",
        "PIL",
        "huggingface_hub",
        "bitsandbytes",
    }


def test_import_from_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pixart_sigma.no_such_name
    with pytest.raises(ImportError):
        exec("from pixart_sigma import no_such_name")


@pytest.mark.parametrize(
    "name", sorted(set(pixart_sigma.__all__) - {"__version__", "DEMO", "DEMO_KV", "DEMO_PHASED"})
)
def test_public_names_resolve(name):
    assert callable(getattr(pixart_sigma, name))
    assert name in dir(pixart_sigma)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_stay_inside_the_engine(path):
    depth = len(path.relative_to(PACKAGE).parts)
    for level, module in imported_names(path.read_text(encoding="utf-8")):
        root = module.partition(".")[0]
        if level == 0:
            # comfy_kitchen and the like are the host's too.
            assert not root.startswith("comfy"), f"{path.name} imports {module} from the host"
            assert root not in {"nodes", "folder_paths", "execution", "server"}, (
                f"{path.name} imports {module}"
            )
            assert root != "pixart_sigma", f"{path.name} imports {module} by its absolute name"
        assert level <= depth, f"{path.name} reaches outside the package"


@pytest.mark.parametrize("path", NODE_SOURCES, ids=lambda path: path.relative_to(NODES).as_posix())
def test_only_one_folder_of_the_nodes_knows_the_host(path):
    in_host = path.parent.name == "host"
    for level, module in imported_names(path.read_text(encoding="utf-8")):
        root = module.partition(".")[0]
        if level == 0:
            assert root not in {"pixart_sigma", "diffusers"} or root == "diffusers" and in_host, (
                f"{path.name} imports {module} by its absolute name"
            )
            from_host = root.startswith("comfy") or root in {"nodes", "folder_paths", "latent_preview"}
            assert in_host or not from_host, f"{path.name} imports {module} from the host"
        assert level <= len(path.relative_to(NODES).parts) + 1, f"{path.name} reaches outside the pack"


def test_downloads_and_batches_alone_import_what_speaks_to_a_network():
    speak = {
        "fsspec",
        "fsspec.core",
        "ray",
        "ray.data",
        "socket",
        "http",
        "requests",
        "httpx",
        "aiohttp",
        "websockets",
        "ftplib",
        "smtplib",
        "urllib.request",
    }
    speaks = set()
    for path in [*SOURCES, *NODE_SOURCES]:
        source = path.read_text(encoding="utf-8")
        names = {module for level, module in imported_names(source) if level == 0}
        # Where the hub's library keeps its files may be asked; that is no network.
        hub = re.findall(r"(?:from|import) huggingface_hub.*", source)
        if names & speak or set(hub) - {"from huggingface_hub import constants"}:
            speaks.add(path.relative_to(PACKAGE.parent).as_posix())
    # To the hub; to a cluster and to places that the user names.
    assert speaks == {f"pixart_sigma/{name}.py" for name in SPEAK}


def test_the_import_reader_sees_every_form():
    source = (
        "import comfy.ops\ndef f():\n    from nodes import x\n    from ..host import y\n    from . import z\n"
    )
    assert imported_names(source) == [(0, "comfy.ops"), (0, "nodes"), (2, "host"), (1, "")]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__"}))
def test_arrows_between_rooms_point_down(module):
    room = module.partition(".")[0]
    reached = {name.partition(".")[0] for name in engine_imports(module)} - {"__init__"}
    assert not reached - ALLOWED[room] - {room}, f"{module} may not import {reached - ALLOWED[room] - {room}}"


def test_no_module_of_the_engine_imports_itself_in_a_circle():
    graph = {module: engine_imports(module) for module in MODULES}
    graph["__init__"] = set()  # which imports a name when it is first asked for
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_rooms_are_one_level_deep_and_their_doors_are_empty():
    for path in SOURCES:
        parts = path.relative_to(PACKAGE).parts
        assert len(parts) <= 2, path
        if path.name == "__init__.py" and len(parts) == 2:
            assert not path.read_text(encoding="utf-8"), f"{path} is not empty"


@pytest.mark.parametrize(
    "path",
    [
        path
        for folder in ("pixart_sigma", "nodes", "tools", "benchmarks", "tests")
        for path in sorted((PACK / folder).rglob("*.py"))
    ],
    ids=lambda path: path.relative_to(PACK).as_posix(),
)
def test_functions_are_short_and_take_few_arguments(path):
    """At most 60 lines, or a comment that begins with `Long` above it; at most 8 parameters."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        explained = lines[first - 2].strip().startswith("# Long")
        assert node.end_lineno - node.lineno < 60 or explained, f"{node.name} has more than 60 lines"
        given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        counted = [argument for argument in given if argument.arg not in ("self", "cls") + SETTINGS_OBJECTS]
        assert len(counted) <= 8, f"{node.name} takes {len(counted)} parameters"


def test_loggers_are_named_after_their_modules():
    for path in [*SOURCES, *NODE_SOURCES]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "logging":
                assert node.attr in {"getLogger", "LogRecord"}, f"{path.name} uses logging.{node.attr}"
