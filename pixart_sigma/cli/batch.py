"""`pixart-sigma batch`: a picture for each row of a file, every model loaded once."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..batch.pictures import Picture, make_pictures, say_bad
from ..batch.rows import parse_seeds, read_rows
from ..errors import SigmaError
from ..files.writing import say
from ..settings import Settings, Ways
from .checks import (
    parse_batch_size,
    read_settings,
    read_ways,
    take_refiner,
    tell,
    tell_adapters,
    tell_guess,
    tell_recipe,
    with_aspect,
)
from .generate import model_arguments
from .output import check_folder_out
from .progress import progress

FAILED = 1  # the exit status where pictures are missing


def batch(arguments) -> int:
    check_folder_out(arguments.out)
    take_refiner(arguments, None)
    base, ways = read_settings(arguments), read_ways(arguments)
    _check(arguments, ways)
    seeds = parse_seeds(arguments.seeds) if arguments.seeds else ()

    from ..batch.folder import BatchFolder
    from ..batch.local import LocalBatch, Settled

    pipeline = _open(arguments, ways)
    tell_recipe(pipeline.checkpoint, base)
    settled = Settled(pipeline)

    def make(given: dict[str, Any]) -> Settings:
        """The row's settings, where it says nothing the options'."""
        row = SimpleNamespace(**given)
        sized = given.keys() & {"size", "width", "height"}
        aspect = given.get("aspect", None if sized else arguments.aspect)
        return settled.settle(with_aspect(read_settings(row, base), aspect, pipeline.base_size))

    pictures, bad = make_pictures(read_rows(arguments.rows), make, seeds, arguments.name)
    if bad and not arguments.skip_bad:
        raise SigmaError(f"{say_bad(bad)}. Mend them, or give --skip-bad to draw the others.")
    if not pictures:
        raise SigmaError(f"{arguments.rows} has no row that can be drawn; write a prompt in each line.")

    folder = BatchFolder(arguments.out)
    with folder.held(_made_with(pipeline)), progress() as bar:
        if bad:
            folder.set_aside(bad)
            tell(f"{len(bad)} rows are left out: {say_bad(bad)}")
        todo = folder.todo(pictures)
        run = LocalBatch(
            pipeline,
            folder,
            settled,
            together=_together(arguments.batch_size, pipeline, todo),
            ending=f".{arguments.format}",
            disk=arguments.disk or LocalBatch.disk,
            on_stage=bar.stage,
            on_count=bar.count,
        )
        _draw(run, pictures, todo)
        if arguments.contact_sheet:
            _write_sheets(folder, pictures)
    say(f"{len(pictures) - len(run.failed)} pictures in {arguments.out}")
    failed = len(run.failed) + len(bad)
    if failed:
        tell(f"{failed} failed; {folder.manifest.path} says why. The same command tries them again.")
    return FAILED if failed else 0


def _check(arguments, ways: Ways) -> None:
    """What can be known of the options before torch is imported."""
    if arguments.batch_size == "auto" and not ways.budget:
        raise SigmaError("--batch-size auto is what fits into a budget; give that too, such as --budget 8GB.")
    if arguments.batch_size not in (None, "auto"):
        parse_batch_size(arguments.batch_size)
    if arguments.refiner and ways.budget:
        raise SigmaError(
            "Both transformers stay loaded in a batch, which --budget does not plan; leave it out."
        )
    if arguments.rows != "-" and not Path(arguments.rows).is_file():
        raise SigmaError(f"{arguments.rows} is no file; give one with a prompt in each line.")


def _open(arguments, ways: Ways):
    """The pipeline that the options name, which keeps its models."""
    from ..pipeline import SigmaPipeline

    pipeline = SigmaPipeline.from_path(**model_arguments(arguments), ways=replace(ways, release="keep"))
    pipeline = pipeline.with_adapters(arguments.adapters or ())
    if arguments.refiner:
        pipeline = pipeline.with_refiner(arguments.refiner)
    tell_guess(pipeline.checkpoint)
    tell_adapters(pipeline.components)
    return pipeline


def _draw(run, pictures: list[Picture], todo: list[Picture]) -> None:
    """Draw what is left to do, and say before how much that is; an interrupt says how much there is now."""
    _tell_beforehand(run, pictures, todo)
    try:
        run.run(todo)
    except KeyboardInterrupt:
        there = len(pictures) - len(run.folder.todo(pictures))
        raise KeyboardInterrupt(
            f"{there} of {len(pictures)} pictures are there; the same command goes on."
        ) from None


def _together(batch_size: str | None, pipeline, pictures: list[Picture]) -> int:
    """How many pictures go through the transformer at once."""
    from ..batch.local import kind_of, most_together

    if batch_size != "auto":
        return 1 if batch_size is None else parse_batch_size(batch_size)
    kinds = {kind_of(picture.settings) for picture in pictures}
    return min((most_together(pipeline, kind) for kind in kinds), default=1)


def _made_with(pipeline) -> dict[str, str]:
    """What all pictures of a batch have in common; a batch goes on with the same alone."""
    from ..devices import dtype_name

    found = {f"{component} (fingerprint)": sha for component, sha in pipeline.fingerprints().items()}
    for adapter in pipeline.components.used_adapters:
        found[f"adapter {adapter.name}"] = f"{adapter.fingerprint} at {adapter.strength:g}"
    precision = pipeline.ways.t5_precision or ""
    return found | {"precision of T5": precision, "dtype": dtype_name(pipeline.dtype)}


def _tell_beforehand(run, pictures: list[Picture], todo: list[Picture]) -> None:
    if len(todo) < len(pictures):
        tell(f"{len(pictures) - len(todo)} of {len(pictures)} pictures are there already.")
    if todo:
        size = min(run.part_size(todo), len(todo))
        parts = -(-len(todo) // size)
        most = size * run.most_bytes(todo)
        tell(
            f"{len(todo)} pictures to draw{f', in {parts} parts' if parts > 1 else ''}; meanwhile up to "
            f"{most / 1e9:.2g} GB of embeddings and latents are in {run.folder.work}."
        )


def _write_sheets(folder, pictures: list[Picture]) -> None:
    from ..batch.contact_sheet import write_contact_sheets

    entries = folder.manifest.read()
    found = [entries.get((picture.row, picture.settings.seed)) for picture in pictures]
    files = [folder.path / entry.file for entry in found if entry and entry.file]
    for sheet in write_contact_sheets([file for file in files if file.is_file()], folder.path):
        say(sheet)
