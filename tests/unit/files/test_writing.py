"""What is written: whole or not at all, with the mode that the umask gives, never in the place of a
device or a link, and cleared where a killed process left it. Each writer is killed in `test_killed.py`."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pixart_sigma.files import writing
from pixart_sigma.files.picture_files import write_picture
from pixart_sigma.files.writing import UNFINISHED, beside, clear_unfinished, folder_beside, say, write_beside

REPOSITORY = Path(__file__).parents[3]
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has neither pipes nor such locks")


def put(path: Path, content: bytes = b"new") -> None:
    write_beside(path, lambda file: file.write(content))


@posix
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_that_the_umask_gives(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # It is the whole process': another thread's files would get a wrong mode meanwhile.
            patch.setattr(os, "umask", lambda mask: 1 / 0)
            put(tmp_path / "file")
            with folder_beside(tmp_path / "folder") as made:
                (made / "private").touch(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "folder" / "private").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


@posix
def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "there.png").symlink_to("real/there.png")
    (tmp_path / "real" / "there.png").write_bytes(b"old")
    (tmp_path / "not_yet.png").symlink_to("real/not_yet.png")
    for name in ("there.png", "not_yet.png"):
        put(tmp_path / name)
        assert (tmp_path / name).is_symlink() and (tmp_path / "real" / name).read_bytes() == b"new"
    assert len(list(tmp_path.rglob("*"))) == 5


@posix
def test_a_pipe_gets_what_is_written_and_stays_one(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()

    def seeking(file):  # as the writers of weights do
        file.write(b"....end")
        file.seek(0)
        file.write(b"from")

    write_beside(pipe, seeking)
    reader.join(10)
    assert read == [b"fromend"]
    assert stat.S_ISFIFO(pipe.stat().st_mode) and list(tmp_path.iterdir()) == [pipe]


@posix
def test_a_picture_for_a_pipe_without_an_ending_is_a_png(tmp_path):
    from PIL import Image

    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert write_picture(pipe, Image.new("RGB", (8, 8)), '{"a": 1}')
    reader.join(10)
    assert read[0].startswith(b"\x89PNG")


@posix
def test_a_device_is_not_replaced(tmp_path):
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        null.write_bytes(b"")
    except OSError:
        null = tmp_path / "link"  # not root's: the real one, which a user cannot harm
        null.symlink_to(os.devnull)
    put(null)
    assert stat.S_ISCHR(null.stat().st_mode) and list(tmp_path.iterdir()) == [null]


OUTPUT = """
from pathlib import Path
from pixart_sigma.files.writing import say, write_beside
say("before")
write_beside(Path("report.json"), lambda file: file.write(b"the report\\n"))
say("after")
"""


@posix
@pytest.mark.parametrize("piped", [False, True], ids=["to a file", "to a pipe"])
def test_a_link_to_standard_output_goes_on_there(tmp_path, piped):
    (tmp_path / "report.json").symlink_to("/dev/stdout")
    with open(tmp_path / "said", "wb") as said:
        done = subprocess.run(
            [sys.executable, "-c", OUTPUT],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE if piped else said,
            check=True,
        )
    said = done.stdout if piped else (tmp_path / "said").read_bytes()
    assert said == b"before\nthe report\nafter\n"
    assert (tmp_path / "report.json").is_symlink()


@posix
def test_what_a_killed_process_left_is_cleared_and_what_another_writes_is_not(tmp_path):
    left, foreign = tmp_path / f".left{UNFINISHED}", tmp_path / ".somebody_elses"
    for path in (left, foreign, tmp_path / UNFINISHED.removeprefix(".")):
        path.write_bytes(b"half")
    (tmp_path / f".folder{UNFINISHED}").mkdir()
    (tmp_path / f".folder{UNFINISHED}" / "model.safetensors").write_bytes(b"half")
    (tmp_path / f".link{UNFINISHED}").symlink_to(foreign)
    with beside(tmp_path / "file") as made, folder_beside(tmp_path / "folder") as folder:
        made.write_bytes(b"whole")
        assert not left.exists(), "cleared before anything is written"
        clear_unfinished(tmp_path)
        assert made.exists() and folder.is_dir()
    names = {path.name for path in tmp_path.iterdir()} - {f".link{UNFINISHED}"}
    assert names == {"file", "folder", foreign.name, UNFINISHED.removeprefix(".")}
    assert foreign.read_bytes() == b"half"


@posix
def test_who_is_cleared_while_it_begins_begins_again(tmp_path, monkeypatch):
    locked, flock = [], writing.fcntl.flock

    def slow(handle, how):
        if not locked:
            locked.append(handle)
            clear_unfinished(tmp_path)  # as another process might, which then has the lock
        return flock(handle, how)

    monkeypatch.setattr(writing.fcntl, "flock", slow)
    put(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_what_fails_leaves_the_old(tmp_path):
    put(tmp_path / "file", b"old")
    for writer in (beside, folder_beside):
        with pytest.raises(KeyboardInterrupt), writer(tmp_path / "file"):
            raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_new_file_replaces_none_and_is_there_whole_or_not_at_all(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))

    def write(file):
        file.write(b"new")
        assert not (tmp_path / "file").exists() or (tmp_path / "file").read_bytes() == b"new"

    write_beside(tmp_path / "file", write, new=True)
    assert (tmp_path / "file").read_bytes() == b"new"
    with pytest.raises(FileExistsError):
        write_beside(tmp_path / "file", lambda file: file.write(b"newer"), new=True)
    assert (tmp_path / "file").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_a_long_name_can_be_written(tmp_path):
    put(tmp_path / ("x" * 255))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_terminal_is_not_commanded(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    say("a\x1b]0;title\x07 name\n雪 \u202egnp")
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07 name\n雪 \\u202egnp\n"
