import io
import json

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pixart_sigma.batch.rows import Row, parse_seeds, read_rows
from pixart_sigma.errors import SigmaError

ROWS = [
    {"prompt": "a boat, at sea", "seed": 7, "steps": 4, "guidance_scale": 3.5, "binning": False},
    {"prompt": 'a "red" house', "size": "512x768"},
]
TABLE = """prompt,seed,Steps,guidance,binning,size
"a boat, at sea",7,4,3.5,no,
"a ""red"" house",,,,,512x768
"""


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return str(path)


def numbered(*numbers):
    return [Row(number, given) for number, given in zip(numbers, ROWS, strict=True)]


def test_a_text_file_has_a_prompt_in_each_line(tmp_path):
    path = write(tmp_path / "prompts.txt", "\ufeffa boat\n\n  a house  \r\nein Haus, größer")
    assert list(read_rows(path)) == [
        Row(1, {"prompt": "a boat"}),
        Row(3, {"prompt": "a house"}),
        Row(4, {"prompt": "ein Haus, größer"}),
    ]


def test_a_table_sets_what_its_columns_say(tmp_path):
    assert list(read_rows(write(tmp_path / "rows.csv", TABLE))) == numbered(1, 2)
    tabs = "prompt\tsteps\na boat, at sea\t4\n"
    assert list(read_rows(write(tmp_path / "rows.tsv", tabs))) == [
        Row(1, {"prompt": "a boat, at sea", "steps": 4})
    ]


def test_json_lines_keep_their_types(tmp_path):
    lines = "\n".join(map(json.dumps, ROWS))
    assert list(read_rows(write(tmp_path / "rows.jsonl", lines))) == numbered(1, 2)
    other = '"only a prompt"\n{"prompt": "a", "timesteps": [999, 500], "negative": null}'
    assert list(read_rows(write(tmp_path / "other.jsonl", other))) == [
        Row(1, {"prompt": "only a prompt"}),
        Row(2, {"prompt": "a", "timesteps": (999, 500)}),
    ]


def test_parquet_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="no pyarrow: pip install pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "rows.parquet"
    write_table(pyarrow.Table.from_pylist([{"size": None, **ROWS[0]}, ROWS[1]]), path)
    assert list(read_rows(str(path))) == numbered(1, 2)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SigmaError, match="can not be read as Parquet"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("content, given", [("a boat\n", "a boat"), ('{"prompt": "a boat"}\n', "a boat")])
def test_standard_input_is_text_or_json_lines(monkeypatch, content, given):
    monkeypatch.setattr("sys.stdin", io.StringIO(content))
    assert list(read_rows("-")) == [Row(1, {"prompt": given})]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("rows.csv", "promt\na boat\n", "column 'promt'"),
        ("rows.csv", "prompt,seed,\na,1,2\n", "column ''"),
        ("rows.csv", 'prompt\n"a' + "b" * 200_000 + '"\n', "not a table"),
        ("rows.txt", "a" * (2**20 + 5), "Line 1 .* is longer"),
    ],
)
def test_a_file_that_can_not_be_what_it_is(tmp_path, name, content, words):
    with pytest.raises(SigmaError, match=words):
        list(read_rows(write(tmp_path / name, content)))


def test_text_that_is_not_utf_8(tmp_path):
    (tmp_path / "rows.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(SigmaError, match=r"not text in UTF-8 \(byte 2\)"):
        list(read_rows(str(tmp_path / "rows.txt")))


@pytest.mark.parametrize(
    "name, line, words",
    [
        ("rows.csv", "a,b,c\n", "more or fewer cells"),
        ("rows.csv", "a\n", "more or fewer cells"),
        ("rows.csv", "a,two\n", "seed is 'two', which is no whole number"),
        ("rows.jsonl", "{\n", "not JSON"),
        ("rows.jsonl", "[" * 100_000 + "\n", "not JSON"),
        ("rows.jsonl", "3\n", "this is a int"),
        ("rows.jsonl", '{"promt": "a"}\n', "no setting 'promt'"),
        ("rows.jsonl", '{"prompt": "a", "binning": "perhaps"}\n', "binning is 'perhaps'.*true or false"),
        ("rows.jsonl", '{"prompt": "a", "sigmas": "1,x"}\n', "sigmas is '1,x', which is no number"),
    ],
)
def test_a_bad_row_is_known_by_its_number(tmp_path, name, line, words):
    before = "prompt,seed\na boat,1\n" if name == "rows.csv" else '{"prompt": "a boat", "seed": 1}\n'
    first, second = read_rows(write(tmp_path / name, before + line))
    assert first == Row(1, {"prompt": "a boat", "seed": 1})
    assert second.number == 2 and not second.given
    with pytest.raises(SigmaError, match=words):
        raise SigmaError(second.error)


def test_seeds():
    assert parse_seeds("0-3,7, 9 - 10") == (0, 1, 2, 3, 7, 9, 10)
    for text in ("", "3-1", "a", "-1", "1-", "0-99999999", "18446744073709551616"):
        with pytest.raises(SigmaError, match="--seeds is"):
            parse_seeds(text)
    with pytest.raises(SigmaError, match="names a seed twice"):
        parse_seeds("1,0-2")


@pytest.mark.parametrize("name", ["rows.txt", "rows.csv", "rows.parquet"])
def test_rows_of_another_file_system(name):
    files = MemoryFileSystem()
    if name.endswith("parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        with files.open(f"/{name}", "wb") as file:
            parquet.write_table(pyarrow.table({"prompt": ["a boat", "a house"]}), file)
    else:
        header = "prompt\n" if name.endswith("csv") else ""
        files.pipe_file(f"/{name}", f"{header}a boat\na house\n".encode("utf-8-sig"))
    assert [row.given["prompt"] for row in read_rows(f"memory://{name}")] == ["a boat", "a house"]


def test_a_file_system_that_nothing_here_opens():
    with pytest.raises(SigmaError, match="nowhere://rows.txt can not be opened here"):
        list(read_rows("nowhere://rows.txt"))
