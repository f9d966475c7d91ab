"""`pixart-sigma batch`: a picture for each row of a file, every model loaded once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..batch.pictures import BadRow, Picture, make_pictures, say_bad
from ..batch.rows import parse_seeds, read_rows
from ..batch.storage import is_remote
from ..batch.workers import parse_pools
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

MANIFEST = "manifest.jsonl"
FAILED = 1  # the exit status where pictures are missing


def batch(arguments) -> int:
    _check_out(arguments)
    take_refiner(arguments, None)
    base, ways = read_settings(arguments), read_ways(arguments)
    _check(arguments, ways)
    seeds = parse_seeds(arguments.seeds) if arguments.seeds else ()
    pools = parse_pools(arguments.workers, arguments.gpus)

    from ..batch.work import Settled

    opening = _opening(arguments, ways)
    pipeline = opening.open()
    tell_guess(pipeline.checkpoint)
    tell_adapters(pipeline.components)
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
    if bad:
        tell(f"{len(bad)} rows are left out: {say_bad(bad)}")

    if arguments.ray:
        failed = _draw_on_ray(arguments, opening, pools, pictures, bad)
    else:
        failed = _draw_here(arguments, settled, pipeline, pictures, bad)
    say(f"{len(pictures) - failed} pictures in {arguments.out}")
    failed += len(bad)
    if failed:
        where = f"{arguments.out.rstrip('/')}/{MANIFEST}"
        tell(f"{failed} failed; {where} says why. The same command tries them again.")
    return FAILED if failed else 0


def _draw_here(arguments, settled, pipeline, pictures: list[Picture], bad: list[BadRow]) -> int:
    """Draw the pictures in this process, and return how many failed."""
    from ..batch.folder import BatchFolder
    from ..batch.local import LocalBatch
    from ..batch.opening import made_with
    from ..batch.work import PictureWork

    folder = BatchFolder(arguments.out)
    with folder.held(made_with(pipeline)), progress() as bar:
        folder.set_aside(bad)
        todo = folder.todo(pictures)
        run = LocalBatch(
            PictureWork(pipeline, settled, f".{arguments.format}"),
            folder,
            together=_together(arguments.batch_size, pipeline, todo),
            disk=arguments.disk or LocalBatch.disk,
            on_stage=bar.stage,
            on_count=bar.count,
        )
        _tell_beforehand(run, pictures, todo)
        _draw(run, pictures, todo)
        if arguments.contact_sheet:
            _write_sheets(folder, pictures)
    return len(run.failed)


def _draw_on_ray(arguments, opening, pools, pictures: list[Picture], bad: list[BadRow]) -> int:
    """Draw the pictures on the cluster that the options name, and return how many failed."""
    import torch

    from ..batch.folder import BatchFolder
    from ..batch.on_ray import RayBatch, cluster, seen_by_a_worker
    from ..batch.ray_workers import Order
    from ..batch.remote import RemoteFolder
    from ..batch.storage import is_remote

    opening = opening.absolute()
    folder = RemoteFolder(arguments.out) if is_remote(arguments.out) else BatchFolder(arguments.out)
    with cluster(arguments.ray, pools) as pools:
        seen = seen_by_a_worker(opening, pools)
        with folder.held(seen), progress() as bar:
            folder.set_aside(bad)
            todo = folder.todo(pictures)
            workers = sum(pool.most for pool in pools.values())
            order = Order(
                opening,
                seen,
                arguments.out if is_remote(arguments.out) else str(Path(arguments.out).absolute()),
                ending=f".{arguments.format}",
                together=int(arguments.batch_size or 1),
                threads=max(torch.get_num_threads() // workers, 1),
            )
            run = RayBatch(order, pools, folder, on_stage=bar.stage, on_count=bar.count)
            _tell_there(pictures, todo)
            _draw(run, pictures, todo)
            if arguments.contact_sheet:
                _write_sheets(folder, pictures)
    return len(run.failed)


def _check_out(arguments) -> None:
    """Raise SigmaError for a folder that cannot be written to, or not by this command."""
    remote = is_remote(arguments.out)
    if not remote:
        check_folder_out(arguments.out)
    elif not arguments.ray:
        raise SigmaError(f"--out is {arguments.out}; only --ray writes there. Give a folder of this machine.")
    elif arguments.contact_sheet:
        raise SigmaError("--contact-sheet is made of files on this machine; leave it out.")


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
    if arguments.ray:
        for option in ("disk", "batch_size"):
            value = getattr(arguments, option)
            if value is not None and (option == "disk" or value == "auto"):
                name = option.replace("_", "-")
                raise SigmaError(f"--{name} {value} is for one machine; leave it out with --ray.")
    elif arguments.workers or arguments.gpus:
        raise SigmaError("--workers and --gpus are for --ray; give that too, such as --ray local.")
    if arguments.rows != "-" and not is_remote(arguments.rows) and not Path(arguments.rows).is_file():
        raise SigmaError(f"{arguments.rows} is no file; give one with a prompt in each line.")


def _opening(arguments, ways: Ways):
    """What the options open."""
    from ..batch.opening import Opening

    return Opening(model_arguments(arguments), ways, tuple(arguments.adapters or ()), arguments.refiner)


def _draw(run, pictures: list[Picture], todo: list[Picture]) -> None:
    """Draw what is left to do; an interrupt says how much there is now."""
    try:
        run.run(todo)
    except KeyboardInterrupt:
        run.folder.collect()
        there = len(pictures) - len(run.folder.todo(pictures))
        raise KeyboardInterrupt(
            f"{there} of {len(pictures)} pictures are there; the same command goes on."
        ) from None


def _together(batch_size: str | None, pipeline, pictures: list[Picture]) -> int:
    """How many pictures go through the transformer at once."""
    from ..batch.local import most_together
    from ..batch.work import kind_of

    if batch_size != "auto":
        return 1 if batch_size is None else parse_batch_size(batch_size)
    kinds = {kind_of(picture.settings) for picture in pictures}
    return min((most_together(pipeline, kind) for kind in kinds), default=1)


def _tell_beforehand(run, pictures: list[Picture], todo: list[Picture]) -> None:
    _tell_there(pictures, todo)
    if todo:
        size = min(run.part_size(todo), len(todo))
        parts = -(-len(todo) // size)
        most = size * run.most_bytes(todo)
        tell(
            f"{len(todo)} pictures to draw{f', in {parts} parts' if parts > 1 else ''}; meanwhile up to "
            f"{most / 1e9:.2g} GB of embeddings and latents are in {run.folder.work}."
        )


def _tell_there(pictures: list[Picture], todo: list[Picture]) -> None:
    if len(todo) < len(pictures):
        tell(f"{len(pictures) - len(todo)} of {len(pictures)} pictures are there already.")


def _write_sheets(folder, pictures: list[Picture]) -> None:
    from ..batch.contact_sheet import write_contact_sheets

    entries = folder.manifest.read()
    found = [entries.get((picture.row, picture.settings.seed)) for picture in pictures]
    files = [folder.path / entry.file for entry in found if entry and entry.file]
    for sheet in write_contact_sheets([file for file in files if file.is_file()], folder.path):
        say(sheet)
