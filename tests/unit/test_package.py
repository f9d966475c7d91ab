"""What importing the package costs, and which way its imports point."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import pixart_sigma

PACKAGE = Path(pixart_sigma.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
NODES = PACKAGE.parent / "nodes"
NODE_SOURCES = sorted(NODES.rglob("*.py"))


def imported_names(source: str) -> list[tuple[int, str]]:
    """(level, module) of every import statement; level is the number of leading dots."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
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


@pytest.mark.parametrize("name", sorted(set(pixart_sigma.__all__) - {"__version__", "DEMO", "DEMO_KV"}))
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


def test_the_import_reader_sees_every_form():
    source = (
        "import comfy.ops\ndef f():\n    from nodes import x\n    from ..host import y\n    from . import z\n"
    )
    assert imported_names(source) == [(0, "comfy.ops"), (0, "nodes"), (2, "host"), (1, "")]
