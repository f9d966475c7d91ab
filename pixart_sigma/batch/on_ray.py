"""A batch on many machines: Ray Data carries the pictures through pools of workers, a pool for each stage."""

import json
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import SigmaError
from .folder import BatchFolder
from .opening import Opening, made_with
from .pictures import Picture
from .ray_workers import STAGES, Order, as_table, identify
from .workers import Pool

LOCAL = "local"
MOST_ROWS = 16  # of a table, the unit of work that is handed on, and of what is lost with a worker
MOST_SENT = 10_000  # rows given to Ray at once, which holds them then
TABLES_FOR_EACH = 4  # so many for a worker of the transformer, or one is at work long after the others
CONNECT_SECONDS = 10
RETRIES = 3  # of a table whose worker died
SPARE = 4  # processors of Ray's own bookkeeping, beside one for each worker


def import_ray() -> Any:
    """Ray, quiet. Raises SigmaError where it is not installed."""
    # Without a word from us Ray tells its makers how it is used.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise SigmaError("--ray needs Ray: pip install 'pixart-sigma[ray]'.") from None
    logging.getLogger("ray.data").setLevel("CRITICAL")
    return ray


@contextmanager
def cluster(address: str, pools: Mapping[str, Pool]) -> Iterator[dict[str, Pool]]:
    """Ray at an address, or "local", within this block; the pools with what each worker has of a GPU.

    Raises SigmaError where no Ray answers, and where it has too little for all workers, for whom it would
    wait for ever.
    """
    ray = import_ray()
    start: dict[str, Any] = {"address": address}
    if address == LOCAL:  # where processors are only counted
        start["num_cpus"] = max(os.cpu_count() or 1, sum(pool.most for pool in pools.values()) + SPARE)
        start["include_dashboard"] = False
    else:
        _check_address(address)
    try:
        ray.init(**start, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise _no_ray(address, error) from error
    try:
        yield fit(pools, ray.cluster_resources())
    finally:
        ray.shutdown()


def fit(pools: Mapping[str, Pool], resources: Mapping[str, float]) -> dict[str, Pool]:
    """The pools with what was not said: a GPU for each worker where there are any. Raises SigmaError where
    they do not fit into a cluster's resources."""
    gpus, processors = resources.get("GPU", 0), resources.get("CPU", 0)
    found = {
        stage: replace(pool, gpus=(1.0 if gpus else 0.0) if pool.gpus is None else pool.gpus)
        for stage, pool in pools.items()
    }
    needed = sum(pool.least * (pool.gpus or 0) for pool in found.values())
    if needed > gpus:
        each = ", ".join(f"{stage} {pool.least} x {pool.gpus:g}" for stage, pool in found.items())
        raise SigmaError(
            f"Ray has {gpus:g} GPUs, and the workers ask for {needed:g} ({each}); give fewer --workers, or "
            "let some share one, such as --gpus t5=0.5,vae=0.5."
        )
    workers = sum(pool.least for pool in pools.values())
    if processors <= workers:
        raise SigmaError(
            f"Ray has {processors:g} processors, into which {workers} workers and Ray itself do not fit; "
            "give fewer --workers, or add machines."
        )
    return found


def _check_address(address: str) -> None:
    """Raise SigmaError where nobody listens, for whom Ray would wait for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not port.isdecimal():  # such as auto, which Ray itself looks for
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_ray(address, error) from error


def _no_ray(address: str, error: Exception) -> SigmaError:
    return SigmaError(
        f"No Ray answers at {address} ({str(error).splitlines()[0]}); start it there with `ray start "
        "--head`, or give --ray local."
    )


def seen_by_a_worker(opening: Opening, pools: Mapping[str, Pool]) -> dict[str, str]:
    """What a worker of the transformer opens, by its fingerprints and the precision that its device has."""
    ray = import_ray()
    look = ray.remote(num_cpus=1, num_gpus=pools["transformer"].gpus)(_look)
    try:
        return ray.get(look.remote(opening))
    except ray.exceptions.RayError as error:
        raise SigmaError(f"A worker can not open the models. {_said(error)}") from error


def _look(opening: Opening) -> dict[str, str]:
    return made_with(opening.open())


@dataclass
class RayBatch:
    """Pictures drawn by workers of a cluster that is connected, into a folder that this process holds.

    on_stage and on_count as for `LocalBatch`; there is one stage, as all go on at once.
    """

    order: Order
    pools: Mapping[str, Pool]
    folder: BatchFolder
    on_stage: Callable[[str], None] = lambda name: None
    on_count: Callable[[int, int], None] = lambda done, total: None
    failed: set[Picture] = field(default_factory=set, init=False)

    def run(self, pictures: Sequence[Picture]) -> None:
        """Draw them. One that fails, or whose workers died again and again, is written down and is then in
        `failed`. Raises SigmaError where no other can be drawn either; what is there stays, and the batch
        goes on from there when it is run again."""
        self.on_stage("pictures")
        left = {identify(picture): picture for picture in pictures}
        for row in self._rows(pictures) if pictures else ():
            if row["fatal"]:
                raise SigmaError(f"{row['fatal']}. The same command goes on once that is mended.")
            picture = left.pop(row["id"])
            if row["error"]:
                self._fail(picture, row["error"])
            else:
                self.folder.take(json.loads(row["carried"]))
            self.on_count(len(pictures) - len(left), len(pictures))
        for picture in left.values():
            self._fail(picture, f"its worker died, {RETRIES + 1} times; memory may have run out there")
        if not self.failed:
            self.folder.clear()

    def _fail(self, picture: Picture, error: str) -> None:
        self.failed.add(picture)
        self.folder.fail(picture, error)

    def _rows(self, pictures: Sequence[Picture]) -> Iterator[dict[str, Any]]:
        """What comes out of the last stage, as it comes."""
        ray = import_ray()
        tables = self._dataset(ray, pictures).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        )
        try:
            for table in tables:
                yield from table.to_pylist()
        except ray.exceptions.RayError as error:
            raise SigmaError(f"Ray gave up. {_said(error)} The same command goes on.") from error

    def _dataset(self, ray: Any, pictures: Sequence[Picture]) -> Any:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # its pictures are found missing
        rows = rows_of_a_table(len(pictures), self.pools["transformer"].most, self.order.together)
        ordered = in_order(pictures)
        parts = [as_table(ordered[at : at + MOST_SENT]) for at in range(0, len(ordered), MOST_SENT)]
        data = ray.data.from_arrow(parts).repartition(target_num_rows_per_block=rows)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of `_retried`, up to 2.63 without a successor
            for stage in STAGES:
                pool = self.pools[stage.name]
                data = data.map_batches(
                    stage,
                    fn_constructor_args=(self.order,),
                    batch_size=None,  # a table
                    batch_format="pyarrow",
                    compute=ray.data.ActorPoolStrategy(min_size=pool.least, max_size=pool.most),
                    num_cpus=1,
                    num_gpus=pool.gpus or None,
                    ray_remote_args_fn=_retried,
                )
        return data


def _retried() -> dict[str, int]:
    """What Ray's own default leaves without end."""
    return {"max_task_retries": RETRIES}


def in_order(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures that go through the transformer together, and of these the ones of the same texts, side by
    side."""
    places: dict[Any, int] = {}

    def place(picture: Picture) -> tuple[int, int]:
        alike, texts = picture.settings.alike, picture.texts
        return places.setdefault(alike, len(places)), places.setdefault(texts, len(places))

    return sorted(pictures, key=place)


def rows_of_a_table(pictures: int, workers: int, together: int) -> int:
    """So many that each worker of the transformer gets some, and whole groups of those that go through it
    together."""
    each = min(-(-pictures // (workers * TABLES_FOR_EACH)), MOST_ROWS)
    return max(-(-each // together), 1) * together


def _said(error: Exception) -> str:
    """What an error of a worker comes to: its last line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
