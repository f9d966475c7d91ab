"""What the documentation shows is what happens."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"


def test_the_examples_of_the_python_page_run(tmp_path, monkeypatch, capsys):
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(examples) >= 8
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), names)
    assert (tmp_path / "circle.png").is_file() and (tmp_path / "triangle.safetensors").is_file()
    assert names["pictures"].shape == (1, 3, 256, 256)
    told = capsys.readouterr().out
    assert "T5 in bf16, streamed" in told and "4 of 4" in told and "no-such-file.safetensors" in told


def test_each_row_of_the_page_about_files_names_a_test_that_there_is():
    page = (DOCS / "files.md").read_text(encoding="utf-8")
    tests = "\n".join(file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    named = set(re.findall(r"`(?:[\w/]+\.py)?(?:::)?(test_\w+)`", page))
    assert len(named) > 50 and named <= defined, sorted(named - defined)
    for file in set(re.findall(r"`((?:unit|host)/[\w/]+\.py)", page)):
        assert (TESTS / file).is_file(), file
