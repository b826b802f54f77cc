"""The recipe of `sci-gpt build`: sources -> splits -> statistics -> shards -> card, put in place when all is done."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sci_gpt.config import DataConfig, SourceConfig
from sci_gpt.data.source import SourceSettings, digest, locate
from sci_gpt.data.sources import make_source
from sci_gpt.data.splits import DuplicateGuard, Era, SplitRule, check_eras
from sci_gpt.data.statistics import TrainingStatistics
from sci_gpt.data.store import FORMAT_VERSION, SPLITS, Store
from sci_gpt.data.store_writer import SplitWriter
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes.data_card import CARD, write_card
from sci_gpt.recipes.facts import store_facts
from sci_tokenizers.sample import Sample, SampleError
from sci_tokenizers.variables import UnknownVariableError


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """One row of the table at the end: one split of one source."""

    source: str
    modality: str
    split: str
    stretches: int
    times: int
    missing_share: float


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build did.

    Attributes:
        path: the store's folder.
        fingerprint: of sources, splits and format version.
        kept: the store was there already, built from the same files and splits.
        seconds: wall time.
        rows: one per source and split.
    """

    path: str
    fingerprint: str
    kept: bool
    seconds: float
    rows: tuple[SplitSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return asdict(self)

    def table(self) -> str:
        """The summary as text."""
        lines = [f"{'source':<22} {'modality':<8} {'split':<6} {'stretches':>9} {'times':>9} {'missing':>8}"]
        for row in self.rows:
            lines.append(
                f"{row.source:<22} {row.modality:<8} {row.split:<6} {row.stretches:>9} {row.times:>9} "
                f"{row.missing_share:>8.1%}"
            )
        return "\n".join(lines)


def build(config: DataConfig, say: Callable[[str], None] = print) -> BuildReport:
    """Build the store that `config` describes at `config.output`.

    A store with the same fingerprint is kept; another one is replaced only after the new one is complete. When anything
    fails the output folder is as it was.

    Args:
        config: the whole configuration.
        say: where progress lines go.

    Raises:
        ConfigError: an era that does not exist.
        DataError: files, units, splits or duplicates; the message names the source.
    """
    started = time.monotonic()
    rules = {source.name: split_rule(config, source) for source in config.sources}
    simulations = [source.name for source in config.sources if source.nature == "simulation"]
    check_eras(list(rules.values()), simulations=simulations, gap_days=config.calendar.gap_days)
    settings = {source.name: source_settings(source) for source in config.sources}
    for row in settings.values():
        make_source(row)
    files = {name: digest(locate(row)) for name, row in settings.items()}
    fingerprint, made_of = fingerprint_of(config, files)
    say(
        f"build {config.name}: {len(settings)} sources, {sum(map(len, files.values()))} files, "
        f"fingerprint {fingerprint[:12]}"
    )
    kept = _existing(config.output, fingerprint)
    if kept is not None:
        say(f"build {config.name}: {config.output} is already built from the same files and splits; kept")
        return report_of(kept, kept=True, seconds=time.monotonic() - started)
    partial = _partial_folder(config.output)
    made = [folder for folder in partial.parents if not folder.exists()]
    try:
        _write(config, partial, rules=rules, files=files, fingerprint=(fingerprint, made_of), say=say)
        _replace(partial, config.output)
    except OSError as error:
        raise DataError(
            f"the store cannot be written to {str(config.output)!r}: {error}; free some space or mend the path "
            "(nothing was changed there)"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()  # a failed build leaves no new empty folder behind
    report = report_of(Store.open(config.output), kept=False, seconds=time.monotonic() - started)
    say(report.table())
    say(f"build {config.name}: {config.output} in {report.seconds:.1f} s; its data card is {config.output / CARD}")
    return report


def source_settings(source: SourceConfig) -> SourceSettings:
    """What the reader needs to know of a configured source."""
    return SourceSettings(
        name=source.name,
        reader=source.reader,
        modality=source.modality,
        package=source.package,
        files=source.files,
        options=source.options,
    )


def split_rule(config: DataConfig, source: SourceConfig) -> SplitRule:
    """The split rule of a configured source.

    Raises:
        ConfigError: it names an era that the calendar does not have.
        DataError: the rule contradicts itself.
    """
    split = source.split
    eras = {era.name: era for era in config.calendar.eras}
    if split.era is not None and split.era not in eras:
        raise ConfigError(
            f"source {source.name!r}: split.era {split.era!r} is not in the calendar; it has {', '.join(eras)}"
        )
    timed = split.era is not None
    return SplitRule(
        source=source.name,
        by=split.by,
        era=Era(**eras[split.era].model_dump()) if split.era is not None else None,
        gap_days=(split.gap_days or config.calendar.gap_days) if timed else None,
        valid=split.valid,
        test=split.test,
        empty=split.empty,
    )


def fingerprint_of(config: DataConfig, files: dict[str, dict[str, str]]) -> tuple[str, dict[str, Any]]:
    """SHA-256 over the files' contents, how they are read and split, and the format version; not over names of folders,
    licences or the code's commit. Also what it is made of, by parts, so that a mismatch can be named."""
    tree = config.model_dump(mode="json", exclude={"name", "output", "shard_megabytes"})
    sources = {}
    for source in tree.pop("sources"):
        del source["licence"], source["citation"]
        split, name = source.pop("split"), source["name"]
        sources[name] = {"files": _digest(files[name]), "reading": _digest(source), "split": _digest(split)}
    parts = {
        "format_version": FORMAT_VERSION,
        "settings": {name: _digest(value) for name, value in tree.items()},
        "sources": sources,
    }
    return _digest(parts), parts


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def report_of(store: Store, *, kept: bool, seconds: float) -> BuildReport:
    """The report of a store, from its manifest."""
    rows = tuple(
        SplitSummary(
            source=name,
            modality=source["modality"],
            split=split,
            stretches=source["splits"][split]["stretches"],
            times=source["splits"][split]["times"],
            missing_share=source["splits"][split]["missing_share"],
        )
        for name, source in store.manifest["sources"].items()
        for split in SPLITS
    )
    return BuildReport(path=str(store.path), fingerprint=store.fingerprint, kept=kept, seconds=seconds, rows=rows)


def _write(
    config: DataConfig,
    partial: Path,
    *,
    rules: dict[str, SplitRule],
    files: dict[str, dict[str, str]],
    fingerprint: tuple[str, dict[str, Any]],
    say: Callable[[str], None],
) -> None:
    started = time.monotonic()
    partial.mkdir(parents=True)
    guard = DuplicateGuard()
    sources, statistics, written = {}, {}, 0
    for number, source in enumerate(config.sources, start=1):
        sources[source.name], statistics[source.name] = _write_source(
            config, source, folder=partial / source.name, rule=rules[source.name], guard=guard
        )
        sources[source.name]["files"] = files[source.name]
        spent = time.monotonic() - started
        times = sum(row["times"] for row in sources[source.name]["splits"].values())
        written += times
        left = spent / number * (len(config.sources) - number)
        say(
            f"build {config.name}: {number}/{len(config.sources)} {source.name}: {times} times, "
            f"{written / max(spent, 1e-9):,.0f} times/s, ETA {left:.0f} s"
        )
    guard.check()
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "fingerprint": fingerprint[0],
        "fingerprint_parts": fingerprint[1],
        "commit": _commit(),
        "calendar": config.calendar.model_dump(mode="json"),
        "sources": sources,
    }
    (partial / "statistics.json").write_text(json.dumps(statistics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    store = Store.open(partial)
    write_card(store_facts(store) | {"path": str(config.output)}, partial / CARD)
    store.close()


def _write_source(
    config: DataConfig, source: SourceConfig, *, folder: Path, rule: SplitRule, guard: DuplicateGuard
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read, split and write one source; its row of the manifest and its statistics."""
    settings = source_settings(source)
    reader = make_source(settings)
    packing = getattr(reader, "packing", lambda _: None)(settings)
    size = int(config.shard_megabytes * 1e6)
    first: Sample | None = None
    training: TrainingStatistics | None = None
    groups: dict[str, None] = {}
    try:
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(SplitWriter(folder / split, size, packing=packing)) for split in SPLITS
            }
            for sample in reader.read(settings):
                if first is None:
                    first = sample
                    training = _empty_statistics(config, sample)
                _same_shape(first, sample)
                groups[sample.key.split("/")[1]] = None
                for split, part in rule.parts(sample):
                    # The split is a part of the key: two pieces of one stretch are two stretches of the store.
                    piece = part if part is sample else replace(part, key=f"{part.key}/{split}")
                    guard.add(piece, split)
                    writers[split].add(piece)
                    if split == "train" and training is not None:
                        training.add(piece)
    except (SampleError, UnknownVariableError) as error:
        raise DataError(str(error)) from error
    if first is None or training is None:
        raise DataError(f"{settings.where}: its files hold no stretch")
    rule.check_complete(groups=list(groups), times={split: writer.num_times for split, writer in writers.items()})
    row = _manifest_row(source, rule, first=first, writers=writers)
    return row, {channel: stats.to_json() for channel, stats in training.finish().items()}


def _empty_statistics(config: DataConfig, sample: Sample) -> TrainingStatistics:
    # A few events know no season: traces have no climatology.
    cyclic = sample.modality != "trace"
    return TrainingStatistics(
        source=sample.source,
        variables=sample.variables,
        levels=sample.levels,
        num_year=config.climatology_year_harmonics if cyclic else 0,
        num_day=config.climatology_day_harmonics if cyclic else 0,
        by_cell=sample.modality == "grid",
    )


def _same_shape(first: Sample, sample: Sample) -> None:
    if sample.channels != first.channels or sample.values.shape[1:] != first.values.shape[1:]:
        raise DataError(
            f"source {sample.source!r}: all stretches have the channels and the grid of the first, {first.key!r} "
            f"({', '.join(first.channels)}; {first.values.shape[2:]}), but {sample.key!r} has "
            f"({', '.join(sample.channels)}; {sample.values.shape[2:]}); make it a source of its own"
        )


def _manifest_row(
    source: SourceConfig, rule: SplitRule, *, first: Sample, writers: dict[str, SplitWriter]
) -> dict[str, Any]:
    splits = {
        split: {
            "stretches": writer.num_stretches,
            "times": writer.num_times,
            "missing_share": writer.num_missing / max(writer.num_values, 1),
            "quality": writer.quality(),
        }
        for split, writer in writers.items()
    }
    return {
        "modality": source.modality,
        "nature": source.nature,
        "licence": source.licence,
        "citation": source.citation,
        "reader": source.reader,
        "package": source.package,
        "variables": list(first.variables),
        "levels": [None if level != level else level for level in first.levels],
        "shape": list(first.values.shape[1:]),
        "step_seconds": first.step_seconds,
        "gap_days": rule.gap_days,
        "split": source.split.model_dump(mode="json"),
        "options": source.model_dump(mode="json")["options"],
        "splits": splits,
    }


def _existing(output: Path, fingerprint: str) -> Store | None:
    if not (output / "manifest.json").exists():
        return None
    try:
        store = Store.open(output)
    except DataError:
        return None  # torn or of another format: it is replaced, after the new one is complete
    return store if store.fingerprint == fingerprint else None


def _partial_folder(output: Path) -> Path:
    if output.exists() and not (output / "manifest.json").exists() and any(output.iterdir()):
        raise DataError(f"{str(output)!r} holds files that are no data store; name another `output`")
    return output.parent / f".{output.name}.partial-{os.getpid()}"


def _replace(partial: Path, output: Path) -> None:
    """Put the finished store in place; an old one is moved aside first and put back if that fails."""
    if not output.exists():
        partial.rename(output)
        return
    old = output.parent / f".{output.name}.old-{os.getpid()}"
    output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _commit() -> str | None:
    """The code's commit, for the record; None outside a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
