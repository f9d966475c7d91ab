"""What the documentation shows is what happens."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"
DEFINED = re.compile(r"^def (test_\w+)", re.MULTILINE)


def test_the_examples_of_the_python_page_run(tmp_path, monkeypatch, capsys):
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(examples) >= 8
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), names)
    assert (tmp_path / "square.png").is_file() and (tmp_path / "triangle.safetensors").is_file()
    assert names["pictures"].shape == (1, 3, 256, 256)
    told = capsys.readouterr().out
    assert "T5 in bf16, streamed" in told and "4 of 4" in told and "no-such-file.safetensors" in told


@pytest.mark.parametrize("page, least", [("files.md", 50), ("security.md", 25)])
def test_each_row_of_a_page_names_a_test_that_there_is(page, least):
    text = (DOCS / page).read_text(encoding="utf-8")
    tests = {file: file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py")}
    defined = {name for source in tests.values() for name in DEFINED.findall(source)}
    named = set(re.findall(r"`(?:[\w/]+\.py)?(?:::)?(test_\w+)`", text))
    assert len(named) > least and named <= defined, sorted(named - defined)
    for file in set(re.findall(r"`((?:unit|host)/[\w/]+\.py)", text)):
        assert (TESTS / file).is_file(), file
    for file, name in re.findall(r"`((?:unit|host)/[\w/]+\.py)::(test_\w+)`", text):
        assert name in DEFINED.findall(tests[TESTS / file]), f"{file} has no {name}"


def test_each_row_of_the_page_about_trust_names_a_test():
    rows = re.findall(
        r"^\| (?!what )(?!-).*", (DOCS / "security.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) > 15 and all("::test_" in row.rpartition(" | ")[2] for row in rows)
