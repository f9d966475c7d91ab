"""The download plan against the published layout; the hub is a function that writes small files."""

import re
from collections import namedtuple
from pathlib import Path

import pytest

from pixart_sigma.cli.commands import main
from pixart_sigma.errors import SigmaError
from pixart_sigma.files import download as downloads
from pixart_sigma.files.download import describe, download, pipeline_folder, plan

LAYOUT = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/spiece.model",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
NAMES = {
    "256": "PixArt-Sigma-XL-2-256x256",
    "512": "PixArt-Sigma-XL-2-512-MS",
    "1024": "PixArt-Sigma-XL-2-1024-MS",
    "2K": "PixArt-Sigma-XL-2-2K-MS",
}
CONFIG_BYTES = {"256": 748, "512": 746, "1024": 785, "2K": 786}


class Hub:
    """Stands for huggingface_hub.hf_hub_download: writes a file, notes what was asked."""

    def __init__(self, broken: str | None = None):
        self.asked = []
        self.revisions = {}
        self.broken = broken

    def __call__(self, *, repo_id: str, filename: str, revision: str | None, local_dir: str) -> str:
        self.asked.append((repo_id, filename))
        self.revisions[repo_id] = revision
        if filename == self.broken:
            raise ConnectionError("the line is down\nmore about it")
        path = Path(local_dir) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{repo_id}/{filename}", encoding="utf-8")
        return str(path)


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch):
    """A disk with 30 GB free, whatever this machine has."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage(10**11, 7 * 10**10, 3 * 10**10))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)


@pytest.mark.parametrize("variant", NAMES)
def test_a_plan_is_a_whole_pipeline(variant):
    files = {file.path: file for file in plan(variant)}
    assert set(files) == LAYOUT and len(plan(variant)) == len(LAYOUT)
    for path, file in files.items():
        own = path.startswith("transformer/")
        assert file.repository == "PixArt-alpha/" + NAMES[variant if own else "1024"]
    assert files["transformer/config.json"].size == CONFIG_BYTES[variant]
    assert files["transformer/diffusion_pytorch_model.safetensors"].size == 2_443_492_488
    encoder = sum(file.size or 0 for path, file in files.items() if path.startswith("text_encoder/"))
    assert encoder == pytest.approx(19.05e9, rel=1e-3)


def test_the_folder_is_where_the_host_looks(tmp_path, monkeypatch):
    assert pipeline_folder("1024") == Path("models/diffusers/PixArt-Sigma-XL-2-1024-MS")
    assert pipeline_folder("2k", tmp_path) == tmp_path / "diffusers" / NAMES["2K"]
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert pipeline_folder("512") == tmp_path / "models" / "diffusers" / NAMES["512"]
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "gone"))
    with pytest.raises(SigmaError, match="COMFYUI_PATH"):
        pipeline_folder("512")


@pytest.mark.parametrize("variant", ["4K", "", "1024x1024", None, "900M"])
def test_an_unknown_variant_is_refused(variant):
    with pytest.raises(SigmaError, match="256, 512, 1024, 2K"):
        plan(variant)


@pytest.mark.parametrize("variant", NAMES)
def test_a_download_leaves_the_published_layout(variant, tmp_path):
    hub = Hub()
    folder = download(variant, tmp_path, ask=False, fetch=hub)
    assert folder == tmp_path / "diffusers" / NAMES[variant]
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == LAYOUT
    transformer = (folder / "transformer/config.json").read_text(encoding="utf-8")
    assert transformer == f"PixArt-alpha/{NAMES[variant]}/transformer/config.json"


@pytest.mark.parametrize("reply", ["", "n", "no", "perhaps"])
def test_sizes_are_shown_before_anything_is_written(reply, tmp_path, capsys):
    hub = Hub()

    def answer(question: str) -> str:
        shown = capsys.readouterr().out
        assert "21.83 GB" in shown and "2.44 GB" in shown and "19.05 GB" in shown
        assert "PixArt-Sigma-XL-2-512-MS" in shown and "PixArt-Sigma-XL-2-1024-MS" in shown
        return reply

    assert download("512", tmp_path, fetch=hub, answer=answer) is None
    assert hub.asked == [] and list(tmp_path.iterdir()) == []


def test_yes_goes_on(tmp_path):
    hub = Hub()
    assert download("512", tmp_path, fetch=hub, answer=lambda question: "Yes") is not None
    assert len(hub.asked) == len(LAYOUT)


def test_nobody_to_answer_is_said(tmp_path):
    def closed(question: str) -> str:
        raise EOFError

    hub = Hub()
    with pytest.raises(SigmaError, match="--yes"):
        download("512", tmp_path, fetch=hub, answer=closed)
    assert hub.asked == []


def test_a_second_variant_shares_the_text_encoder(tmp_path):
    first = download("1024", tmp_path, ask=False, fetch=Hub())
    text = describe("512", tmp_path)
    assert text.count("here already") == 5 and text.splitlines()[-1].endswith("2.44 GB")
    hub = Hub()
    second = download("512", tmp_path, ask=False, fetch=hub)
    assert {name for _, name in hub.asked} == {name for name in LAYOUT if name.startswith("transformer/")}
    name = "text_encoder/model-00001-of-00002.safetensors"
    assert (first / name).samefile(second / name)


def test_without_links_the_files_are_downloaded(tmp_path, monkeypatch):
    def no_link(source, target):
        raise OSError("no links here")

    download("1024", tmp_path, ask=False, fetch=Hub())
    monkeypatch.setattr(downloads.os, "link", no_link)
    hub = Hub()
    download("512", tmp_path, ask=False, fetch=hub)
    assert {name for _, name in hub.asked} == LAYOUT


def test_the_hub_checks_what_is_there_already(tmp_path):
    download("1024", tmp_path, ask=False, fetch=Hub())
    hub = Hub()
    download("1024", tmp_path, ask=False, fetch=hub)
    assert {name for _, name in hub.asked} == LAYOUT


def test_a_broken_line_is_one_sentence_and_can_go_on(tmp_path):
    broken = "vae/diffusion_pytorch_model.safetensors"
    with pytest.raises(SigmaError, match="the line is down") as caught:
        download("1024", tmp_path, ask=False, fetch=Hub(broken))
    assert broken in str(caught.value) and "\n" not in str(caught.value)
    assert download("1024", tmp_path, ask=False, fetch=Hub()) is not None


def test_an_interrupt_passes_through_and_says_what_is_there(tmp_path, monkeypatch, capsys):
    def interrupted(**asked):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download("1024", tmp_path, ask=False, fetch=interrupted)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", interrupted)
    assert main(["download", "1024", "--to", str(tmp_path), "--yes"]) == 130
    assert capsys.readouterr().err == "\nInterrupted; what is there stays, and the same command goes on.\n"


def test_a_commit_is_asked_for_whatever_is_published_later(tmp_path):
    hub = Hub()
    download("512", tmp_path, ask=False, fetch=hub)
    assert len(hub.revisions) == 2
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for revision in hub.revisions.values())


def test_a_small_disk_is_noticed_first(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage(10**10, 0, 10**10))
    hub = Hub()
    with pytest.raises(SigmaError, match="21.83 GB more.*10.00 GB free"):
        download("1024", tmp_path, ask=False, fetch=hub)
    assert hub.asked == []


def test_a_target_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "models").write_text("not a folder")
    with pytest.raises(SigmaError, match="another target"):
        download("1024", tmp_path / "models", ask=False, fetch=Hub())
