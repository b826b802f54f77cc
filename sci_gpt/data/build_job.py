"""Build jobs: parts of a source read, split and written by one process; the jobs of a source put together."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from sci_gpt.data.duplicates import DuplicateGuard
from sci_gpt.data.in_place_writer import InPlaceWriter
from sci_gpt.data.source import Part, SourceSettings
from sci_gpt.data.source_zarr import ZarrGrid
from sci_gpt.data.sources import make_source
from sci_gpt.data.splits import SplitRule
from sci_gpt.data.statistics import TrainingStatistics
from sci_gpt.data.store import SPLITS
from sci_gpt.data.store_writer import Packing, SplitWriter
from sci_gpt.errors import DataError
from sci_tokenizers import sample as sample_module
from sci_tokenizers.sample import Sample, SampleError
from sci_tokenizers.variables import UnknownVariableError

DONE = "done.json"  # written last: what the job found, and the bytes of its files
_MOST_IN_PLACE = 64  # jobs of a source that stays where it is
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV)  # a file system that has none
_SLACK = 1.5  # a job's shard may be so much larger than planned before another is begun


@dataclass(frozen=True, kw_only=True)
class Job:
    """Consecutive parts of one source, about a shard of them.

    What it writes depends on the files and on these settings alone: not on who runs it, beside what, or how often.

    Attributes:
        number: among the source's jobs.
        settings, rule: of the source.
        parts: to read, in order.
        shard_bytes: of a shard, about.
        packing: the archive's integers.
        num_year, num_day: harmonics of the climatology.
        in_place: only an index is written.
    """

    number: int
    settings: SourceSettings
    rule: SplitRule
    parts: tuple[Part, ...]
    shard_bytes: int
    packing: Packing | None
    num_year: int
    num_day: int
    in_place: bool = False

    @property
    def bytes(self) -> int:
        """About what its samples' values take as float32."""
        return sum(part.bytes for part in self.parts)

    @property
    def digest(self) -> str:
        """Of all that decides what it writes, beside the files: two builds may cut their jobs otherwise."""
        parts = [(part.name, part.bytes) for part in self.parts]
        told = (_code(), self.number, self.settings, self.rule, parts, self.shard_bytes, self.packing)
        return hashlib.sha256(repr((*told, self.num_year, self.num_day, self.in_place)).encode()).hexdigest()

    def folder(self, jobs: Path) -> Path:
        """Where its output lies under the folder of all jobs."""
        return jobs / self.settings.name / f"{self.number:06d}"

    def statistics(self, first: dict[str, Any]) -> TrainingStatistics:
        """Empty sums for the channels of its stretches."""
        return TrainingStatistics(
            source=self.settings.name,
            variables=tuple(first["variables"]),
            levels=tuple(float("nan") if level is None else float(level) for level in first["levels"]),
            # A few events know no season: traces have no climatology.
            num_year=self.num_year if self.settings.modality != "trace" else 0,
            num_day=self.num_day if self.settings.modality != "trace" else 0,
            by_cell=self.settings.modality == "grid",
        )


def plan_jobs(
    settings: SourceSettings, rule: SplitRule, *, shard_bytes: int, num_year: int, num_day: int
) -> tuple[Job, ...]:
    """The jobs of a source: its parts in order, as many in each as fill about one shard.

    Raises:
        DataError: files or options that cannot be used.
    """
    reader = make_source(settings)
    packing: Packing | None = getattr(reader, "packing", lambda _: None)(settings)
    stored = 1.0 if packing is None else int(packing.dtype[-1]) / 4
    parts, groups = reader.parts(settings), list[list[Part]]([[]])
    if rule.buffer_km is not None:  # what is near a held-out station must be known before anything is written
        rule = rule.with_places(sample for part in parts for sample in reader.read(settings, part))
    in_place = isinstance(reader, ZarrGrid) and reader.is_in_place(settings)
    if in_place:  # each job opens the Zarr and lists its chunks: no more than some dozens
        shard_bytes = max(shard_bytes, sum(part.bytes for part in parts) // _MOST_IN_PLACE)
    for part in parts:
        if groups[-1] and stored * sum(row.bytes for row in [*groups[-1], part]) > shard_bytes:
            groups.append([])
        groups[-1].append(part)
    if not groups[-1]:
        raise DataError(f"{settings.where}: its files hold no stretch")
    return tuple(
        Job(
            number=number,
            settings=settings,
            rule=rule,
            parts=tuple(parts),
            shard_bytes=shard_bytes,
            packing=packing,
            num_year=num_year,
            num_day=num_day,
            in_place=in_place,
        )
        for number, parts in enumerate(groups)
    )


def run_job(job: Job, jobs: Path) -> None:
    """Read, split and write a job's parts under `jobs`; its folder appears when all of it is written.

    Raises:
        DataError: files, units or splits; the message names the source.
    """
    target = job.folder(jobs)
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        with threadpool_limits(1):  # sums of several threads round otherwise
            said = _write(job, partial)
        said["files"] = {
            path.relative_to(partial).as_posix(): _sha256(path) for path in sorted(partial.rglob("*")) if path.is_file()
        }
        (partial / DONE).write_text(json.dumps(said | {"job": job.digest}), encoding="utf-8")
        if not is_done(job, jobs):  # another process may have been given the same job
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
    except (SampleError, UnknownVariableError) as error:
        raise DataError(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_done(job: Job, jobs: Path) -> bool:
    """Whether this very job was finished before, by this code, with all that it wrote still there as it was written."""
    folder = job.folder(jobs)
    try:
        said = json.loads((folder / DONE).read_text(encoding="utf-8"))
        return said["job"] == job.digest and all(
            _sha256(folder / name) == digest for name, digest in said["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False  # none, torn or another's: it is run again


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _code() -> str:
    """Digest of the code that reads and writes."""
    files = sorted(path for name in (__file__, sample_module.__file__) for path in Path(str(name)).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _write(job: Job, folder: Path) -> dict[str, Any]:
    """Write shards, statistics and what is compared of a job; what it says of itself."""
    settings, reader = job.settings, make_source(job.settings)
    first: dict[str, Any] | None = None
    training: TrainingStatistics | None = None
    guard, groups = DuplicateGuard(), dict[str, None]()
    size = int(_SLACK * job.shard_bytes)
    with ExitStack() as stack:
        writers: dict[str, SplitWriter | InPlaceWriter] = {}
        for split in SPLITS:
            if job.in_place:
                writers[split] = stack.enter_context(InPlaceWriter(folder / split))
            else:
                writers[split] = stack.enter_context(SplitWriter(folder / split, size, packing=job.packing))
        for part in job.parts:
            for sample in reader.read(settings, part):
                if first is None or training is None:
                    first = _shape(sample)
                    training = job.statistics(first)
                _same_shape(first, _shape(sample), source=settings.name)
                groups[sample.key.split("/")[1]] = None
                for split, cut in job.rule.parts(sample):
                    # The split is a part of the key: two pieces of one stretch are two stretches of the store.
                    piece = cut if cut is sample else replace(cut, key=f"{cut.key}/{split}")
                    guard.add(piece, split)
                    writers[split].add(piece)
                    if split == "train":
                        training.add(piece)
    if first is None or training is None:
        raise DataError(f"{settings.where}: {job.parts[0].name} holds no stretch")
    training.save(folder / "statistics.npz")
    guard.save(folder / "duplicates.npz")
    splits = {
        split: {
            "stretches": writer.num_stretches,
            "times": writer.num_times,
            "values": writer.num_values,
            "missing": writer.num_missing,
            "quality": writer.quality(),
        }
        for split, writer in writers.items()
    }
    return {"first": first, "groups": list(groups), "splits": splits}


def _shape(sample: Sample) -> dict[str, Any]:
    """What all stretches of a source share (but the key), as JSON has it."""
    return {
        "key": sample.key,
        "channels": list(sample.channels),
        "variables": list(sample.variables),
        "levels": [None if level != level else float(level) for level in sample.levels],
        "shape": list(sample.values.shape[1:]),
        "step_seconds": sample.step_seconds,
    }


def _same_shape(first: dict[str, Any], other: dict[str, Any], *, source: str) -> None:
    if first["channels"] != other["channels"] or first["shape"] != other["shape"]:
        raise DataError(
            f"source {source!r}: all stretches have the channels and the grid of the first, {first['key']!r} "
            f"({', '.join(first['channels'])}; {first['shape'][1:]}), but {other['key']!r} has "
            f"({', '.join(other['channels'])}; {other['shape'][1:]}); make it a source of its own"
        )


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What the jobs of one source found together.

    Attributes:
        first: of the first stretch: key, channels, variables, levels, shape, step_seconds.
        splits: {split: {"stretches", "times", "missing_share", "quality"}}.
        statistics: of the training split.
    """

    first: dict[str, Any]
    splits: dict[str, dict[str, Any]]
    statistics: TrainingStatistics


def gather(source_jobs: Sequence[Job], jobs: Path, *, folder: Path, guard: DuplicateGuard) -> Gathered:
    """Put the finished jobs of one source together: shards in the order of the jobs, sums, what is compared.

    Args:
        source_jobs: all of the source.
        jobs: folder of the jobs' output, which stays as it is.
        folder: the source's in the store.
        guard: takes in what the jobs saw.

    Raises:
        DataError: stretches that differ in channels or grid, a split that is empty, a group that is not there.
    """
    said = [json.loads((job.folder(jobs) / DONE).read_text(encoding="utf-8")) for job in source_jobs]
    first, statistics = said[0]["first"], None
    for job, row in zip(source_jobs, said, strict=True):
        _same_shape(first, row["first"], source=job.settings.name)
        part = job.statistics(first).load(job.folder(jobs) / "statistics.npz")
        if statistics is None:
            statistics = part  # the sums themselves: one job's are those of a build that knew no jobs
        else:
            statistics.merge(part)
        guard.merge(DuplicateGuard.load(job.folder(jobs) / "duplicates.npz"))
    if statistics is None:
        raise ValueError("no job")
    splits = {}
    for split in SPLITS:
        parts = [row["splits"][split] for row in said]
        values, missing = (sum(part[name] for part in parts) for name in ("values", "missing"))
        splits[split] = {
            "stretches": sum(part["stretches"] for part in parts),
            "times": sum(part["times"] for part in parts),
            "missing_share": missing / max(values, 1),
            "quality": {
                rule: {count: sum(part["quality"][rule][count] for part in parts) for count in ("spans", "times")}
                for rule in parts[0]["quality"]
            },
        }
    source_jobs[0].rule.check_complete(
        groups=list(dict.fromkeys(group for row in said for group in row["groups"])),
        times={split: row["times"] for split, row in splits.items()},
    )
    for split in SPLITS:
        folders = [job.folder(jobs) / split for job in source_jobs]
        if source_jobs[0].in_place:
            splits[split] |= _gather_in_place(folders, folder / split)
        else:
            _gather_split(folders, folder / split)
    return Gathered(first=first, splits=splits, statistics=statistics)


def _gather_in_place(folders: Sequence[Path], target: Path) -> dict[str, Any]:
    """The indices of several folders as one: stretches that follow each other are joined; what there is of them now."""
    with InPlaceWriter(target) as writer:
        for folder in folders:
            writer.take(folder)
    return {"stretches": writer.num_stretches, "quality": writer.quality()}


def _gather_split(folders: Sequence[Path], target: Path) -> None:
    """The shards of several folders in one, numbered anew; files are linked where the file system can."""
    target.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for folder in folders:
        for number, row in enumerate(json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]):
            old, new = f"shard-{number:05d}.", f"shard-{len(rows):05d}."
            for path in sorted(folder.glob(f"{old}*")):
                _link(path, target / path.name.replace(old, new))
            rows.append(
                {name: value.replace(old, new) if isinstance(value, str) else value for name, value in row.items()}
            )
    (target / "index.json").write_text(json.dumps({"shards": rows}, indent=1) + "\n", encoding="utf-8")


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(path, target)
