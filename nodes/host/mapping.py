"""Weights mapped to their files or read into RAM, as the host was told."""

import comfy.cli_args

from ...pixart_sigma.files.mapping import map_files


def obey_host() -> None:
    """Read files into RAM where ComfyUI was started with --disable-mmap."""
    map_files(not comfy.cli_args.args.disable_mmap)
