"""The package as people install it, without the repository beside it."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
BUILT_FROM = ("pixart_sigma", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")


@pytest.fixture
def installed(tmp_path) -> Path:
    """The folder of the programs of a fresh environment with a wheel of the package.

    What it needs comes from the environment of the tests, since no test asks a network.
    """
    source = tmp_path / "source"
    source.mkdir()
    for name in BUILT_FROM:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(path, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run([*pip, *wheel], check=True, capture_output=True, text=True)
    shutil.rmtree(source)

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    programs = environment / ("Scripts" if sys.platform == "win32" else "bin")
    (packages,) = environment.glob("**/site-packages")
    (packages / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (built,) = tmp_path.glob("*.whl")
    python = [*pip[:3], "--python", str(programs / "python"), *pip[3:]]
    subprocess.run(
        [*python, "install", "--no-deps", "--no-index", str(built)],
        check=True,
        capture_output=True,
        text=True,
    )
    return programs


@pytest.mark.slow
def test_an_installed_wheel_makes_a_picture(installed, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = "import json, pixart_sigma; print(json.dumps([pixart_sigma.__file__, dir(pixart_sigma)]))"
    told = subprocess.run(
        [installed / "python", "-c", code],
        cwd=elsewhere,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    file, names = json.loads(told)
    assert Path(file).is_relative_to(tmp_path) and "SigmaPipeline" in names
    assert (Path(file).parent / "py.typed").is_file()
    done = subprocess.run(
        [installed / "pixart-sigma", "generate", "a red circle", "--steps", "2", "--device", "cpu"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(elsewhere / "picture.png") as picture:
        assert picture.size == (256, 256)
