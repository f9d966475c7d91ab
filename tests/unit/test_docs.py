"""What the documentation shows is what happens."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


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
