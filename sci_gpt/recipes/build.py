"""The recipe of `sci-gpt build`: sources -> splits -> statistics -> shards -> card, put in place when all is done."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from sci_gpt.config import DataConfig, SourceConfig
from sci_gpt.data.build_job import Gathered, Job, gather, plan_jobs
from sci_gpt.data.duplicates import DuplicateGuard
from sci_gpt.data.in_place import FOLDER
from sci_gpt.data.manifest import MANIFEST
from sci_gpt.data.source import SourceSettings
from sci_gpt.data.source_zarr import ZarrGrid
from sci_gpt.data.sources import contents, file_bytes, make_source
from sci_gpt.data.splits import Era, SplitRule, check_eras
from sci_gpt.data.store import FORMAT_VERSION, SPLITS, Store
from sci_gpt.data.store_writer import check_files, publish, seal
from sci_gpt.errors import ConfigError, DataError
from sci_gpt.recipes.build_place import put_in_place, workplace
from sci_gpt.recipes.build_workers import run_jobs
from sci_gpt.recipes.data_card import CARD, write_card
from sci_gpt.recipes.facts import store_facts
from sci_gpt.recipes.token_report import ALLOWED, check_tokens

_LONG_READ = 1_000_000_000  # bytes of files that are not hashed without a word


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
    """Build the store that `config` describes at `config.output`; for a URL in `data/NAME`, from where it is copied.

    A store with the same fingerprint is kept; another one is replaced only after the new one is complete. When the
    build is refused the output folder is as it was. When it is killed, the jobs that were finished are found and kept
    by the next build of the same files and splits, whose result is the same to the last bit.

    Args:
        config: the whole configuration.
        say: where progress lines go.

    Raises:
        ConfigError: an era that does not exist; a scheduler that does not answer.
        DataError: files, units, splits or duplicates; a series that tokens would spoil (`check_tokens`); the message
            names the source. A URL that cannot be written.
    """
    if isinstance(config.output, Path):
        return _build(config, config.output, say=say)
    here = Path("data") / config.name
    say(f"build {config.name}: in {here}, to be copied to {config.output}")
    report = _build(config, here, say=say)
    copied = publish(here, config.output)
    say(
        f"build {config.name}: {copied / 1e6:,.1f} MB copied to {config.output}"
        if copied
        else f"build {config.name}: {config.output} holds this store already; kept"
    )
    return replace(report, path=config.output)


def _build(config: DataConfig, output: Path, *, say: Callable[[str], None]) -> BuildReport:
    started = time.monotonic()
    rules = {source.name: split_rule(config, source) for source in config.sources}
    simulations = [source.name for source in config.sources if source.nature == "simulation"]
    check_eras(list(rules.values()), simulations=simulations, gap_days=config.calendar.gap_days)
    settings = {source.name: source_settings(config, source) for source in config.sources}
    for row in settings.values():
        make_source(row)
    size = sum(file_bytes(row) for row in settings.values())
    if size > _LONG_READ:
        say(f"build {config.name}: reading {size / 1e9:.1f} GB once for the fingerprint")
    files = {name: contents(row) for name, row in settings.items()}
    fingerprint, made_of = fingerprint_of(config, files)
    say(
        f"build {config.name}: {len(settings)} sources, {sum(map(len, files.values()))} files, "
        f"fingerprint {fingerprint[:12]}"
    )
    with workplace(output, fingerprint) as folder:
        kept = _existing(config, output, fingerprint=fingerprint, say=say)
        if kept is not None:
            say(f"build {config.name}: {output} is already built from the same files and splits; kept")
            return report_of(kept, kept=True, seconds=time.monotonic() - started)
        jobs = {
            name: plan_jobs(
                row,
                rules[name],
                shard_bytes=int(config.shard_megabytes * 1e6),
                num_year=config.climatology_year_harmonics,
                num_day=config.climatology_day_harmonics,
            )
            for name, row in settings.items()
        }
        run_jobs(config, [job for row in jobs.values() for job in row], folder=folder, say=say)
        with threadpool_limits(1):  # as in the jobs: the same bits whoever builds
            store = _put_together(
                config, folder, output=output, jobs=jobs, say=say, files=files, fingerprint=(fingerprint, made_of)
            )
        put_in_place(store, output)
    report = report_of(Store.open(output), kept=False, seconds=time.monotonic() - started)
    say(report.table())
    say(f"build {config.name}: {output} in {report.seconds:.1f} s; its data card is {output / CARD}")
    return report


def source_settings(config: DataConfig, source: SourceConfig) -> SourceSettings:
    """What the reader needs to know of a configured source."""
    return SourceSettings(
        name=source.name,
        reader=source.reader,
        modality=source.modality,
        package=source.package,
        files=source.files,
        options=source.options,
        stretch_bytes=round(config.stretch_megabytes * 1e6),
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
        buffer_km=split.buffer_km,
        valid=split.valid,
        test=split.test,
        empty=split.empty,
    )


def fingerprint_of(config: DataConfig, files: dict[str, dict[str, str]]) -> tuple[str, dict[str, Any]]:
    """SHA-256 over the files' contents, how they are read and split, and the format version; not over names of folders,
    licences or the code's commit. Also what it is made of, by parts, so that a mismatch can be named."""
    tree = config.model_dump(mode="json", exclude={"name", "output", "shard_megabytes", "tokens", "build"})
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


def _put_together(
    config: DataConfig,
    jobs_folder: Path,
    *,
    output: Path,
    jobs: dict[str, tuple[Job, ...]],
    say: Callable[[str], None],
    files: dict[str, dict[str, str]],
    fingerprint: tuple[str, dict[str, Any]],
) -> Path:
    """The store from the finished jobs, beside them: shards, statistics, card; the manifest is written last."""
    folder = jobs_folder / "store"
    shutil.rmtree(folder, ignore_errors=True)
    guard = DuplicateGuard()
    sources, statistics = {}, {}
    for source in config.sources:
        found = gather(jobs[source.name], jobs_folder, folder=folder / source.name, guard=guard)
        sources[source.name] = _manifest_row(source, jobs[source.name][0].rule, found=found)
        sources[source.name]["files"] = files[source.name]
        settings, rule = jobs[source.name][0].settings, jobs[source.name][0].rule
        for station, (held, km) in (rule.near or {}).items():
            say(f"build {config.name}: {source.name}: station {station!r} is left out: {km:g} km from {held!r}")
        reader = make_source(settings)
        if isinstance(reader, ZarrGrid) and reader.is_in_place(settings):
            notes = reader.note_in_place(settings, folder / source.name / FOLDER)
            sources[source.name]["in_place"] = notes
            for group, row in notes.items():
                say(
                    f"build {config.name}: {source.name}/{group} is read in place; one time of one tile decodes "
                    f"{row['amplification']:g} bytes for each that it needs"
                )
        statistics[source.name] = {name: row.to_json() for name, row in found.statistics.finish().items()}
    say(f"build {config.name}: comparing the splits for duplicates")
    guard.check()
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "fingerprint": fingerprint[0],
        "fingerprint_parts": fingerprint[1],
        "commit": _commit(),
        "calendar": config.calendar.model_dump(mode="json"),
        "sources": sources,
        ALLOWED: list(config.tokens.allow),
    }
    (folder / "statistics.json").write_text(json.dumps(statistics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    seal(folder, manifest)
    store = Store.open(folder)
    say(f"build {config.name}: looking at what tokens keep of the series")
    check_tokens(store, config.tokens.allow)
    write_card(store_facts(store) | {"path": str(output)}, folder / CARD)
    store.close()
    return folder


def _manifest_row(source: SourceConfig, rule: SplitRule, *, found: Gathered) -> dict[str, Any]:
    return {
        "modality": source.modality,
        "nature": source.nature,
        "licence": source.licence,
        "citation": source.citation,
        "reader": source.reader,
        "package": source.package,
        "variables": found.first["variables"],
        "levels": found.first["levels"],
        "shape": found.first["shape"],
        "step_seconds": found.first["step_seconds"],
        "gap_days": rule.gap_days,
        "split": source.split.model_dump(mode="json"),
        "within_buffer": {station: [held, round(km, 3)] for station, (held, km) in (rule.near or {}).items()},
        "options": source.model_dump(mode="json")["options"],
        "splits": found.splits,
    }


def _existing(config: DataConfig, output: Path, *, fingerprint: str, say: Callable[[str], None]) -> Store | None:
    """The store that is there already, whole and of the same files and splits; what else it says is brought up to date.

    Another one, of another format or damaged, is replaced after the new one is complete.
    """
    if not (output / MANIFEST).exists():
        return None
    try:
        store = Store.open(output)
        if store.fingerprint != fingerprint:
            return None
        check_files(output)
    except DataError as error:
        say(f"build {config.name}: {output} cannot be kept: {error}")
        return None
    said = {row.name: {"licence": row.licence, "citation": row.citation} for row in config.sources}
    rows = {name: row | said[name] for name, row in store.manifest["sources"].items()}
    if store.manifest.get(ALLOWED) != list(config.tokens.allow):
        check_tokens(store, config.tokens.allow)
        seal(output, store.manifest | {ALLOWED: list(config.tokens.allow)})
        store = Store.open(output)
    if rows != store.manifest["sources"]:
        seal(output, store.manifest | {"sources": rows})
        store = Store.open(output)
        write_card(store_facts(store) | {"path": str(output)}, output / CARD)
        say(f"build {config.name}: licences or citations were changed in {output}")
    return store


def _commit() -> str | None:
    """The code's commit, for the record; None outside a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
