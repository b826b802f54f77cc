"""Reads the points of a scaling law: one trained model per line, its size, its tokens and its loss."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sci_gpt.errors import ConfigError, DataError

REQUIRED = ("params", "tokens", "loss")
OPTIONAL = ("flops", "epochs")
FLOPS_PER_PARAM_TOKEN = 6.0  # C = 6 N D: forward 2, backward 4 (Kaplan et al. 2020, section 2.1)


@dataclass(frozen=True, kw_only=True)
class Points:
    """Trained models, one entry of each array per model (shape (n,), all > 0).

    Attributes:
        params: N, parameters.
        tokens: D, training tokens, repetitions counted.
        loss: L, in the loss's own unit.
        flops: C, FLOPs of the training.
        epochs: passes over the data; None where the table does not say.
    """

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    flops: np.ndarray
    epochs: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def flops_per_param_token(self) -> float:
        """k of C = k N D, the points' geometric mean; 6 where the table has no flops."""
        return float(np.exp(np.mean(np.log(self.flops / (self.params * self.tokens)))))

    def distinct(self) -> tuple[int, int]:
        """How many different N and how many different D there are."""
        return len(np.unique(self.params)), len(np.unique(self.tokens))


def make_points(columns: Mapping[str, np.ndarray]) -> Points:
    """Points of columns by name (params, tokens, loss, and flops, epochs where known); flops is 6 N D where missing."""
    found = {name: np.asarray(columns[name], dtype=np.float64) for name in (*REQUIRED, *OPTIONAL) if name in columns}
    found.setdefault("flops", FLOPS_PER_PARAM_TOKEN * found["params"] * found["tokens"])
    return Points(**found)


def read_points(path: Path, *, modality: str | None = None) -> Points:
    """Points of a CSV with columns params, tokens, loss, and where known flops, epochs; other columns are not read.

    Args:
        path: the table, one trained model per line.
        modality: the value of the column `modality` whose lines are wanted; None: all, if there is only one.

    Raises:
        DataError: no such file, not a table of text, a missing or doubled column, a value that is not a positive
            number, or the same loss everywhere.
        ConfigError: losses of several modalities, which are in different units, or a modality that is not there.
    """
    rows = _one_modality(_read_rows(path), path, modality=modality)
    names = (*REQUIRED, *(name for name in OPTIONAL if name in rows[0][1]))
    columns = {
        name: np.array([_positive(row[name], f"{str(path)!r}, line {line}, column {name!r}") for line, row in rows])
        for name in names
    }
    loss = columns["loss"]
    if len(loss) > 1 and np.ptp(loss) <= 1e-12 * loss.max():
        raise DataError(
            f"{str(path)!r}: the loss is {loss[0]:g} in all {len(loss)} lines; give points whose loss varies"
        )
    return make_points(columns)


def _read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, {column: text}) of every line that is not blank."""
    if not path.exists():
        raise DataError(f"no file {str(path)!r}; check the path, or make it with `sci-gpt sweep`")
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a folder; give the CSV itself")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{str(path)!r} is not a CSV of text ({error}); give a table with a header") from error
    if not lines:
        raise DataError(f"{str(path)!r} is empty; give a CSV with the columns {', '.join(REQUIRED)}")
    header = [cell.strip() for cell in lines[0][1]]
    _check_header(header, path)
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise DataError(
                f"{str(path)!r}, line {number}: {len(cells)} cells under {len(header)} columns; mend the line"
            )
    return [(number, dict(zip(header, (cell.strip() for cell in cells), strict=True))) for number, cells in lines[1:]]


def _check_header(header: list[str], path: Path) -> None:
    doubled = sorted({name for name in header if name and header.count(name) > 1})
    if doubled:
        raise DataError(f"{str(path)!r}: column {doubled[0]!r} stands {header.count(doubled[0])} times; name each once")
    for name in REQUIRED:
        if name not in header:
            near = difflib.get_close_matches(name, header, n=1)
            remedy = f"rename {near[0]!r}" if near else f"give {', '.join(REQUIRED)}"
            raise DataError(f"{str(path)!r}: no column {name!r} among {header}; {remedy}")


def _one_modality(
    rows: list[tuple[int, dict[str, str]]], path: Path, *, modality: str | None
) -> list[tuple[int, dict[str, str]]]:
    if not rows:
        raise DataError(f"{str(path)!r} has a header and no line; give one line per trained model")
    known = sorted({row["modality"] for _, row in rows}) if "modality" in rows[0][1] else []
    if modality is None:
        if len(known) > 1:
            what = f"{str(path)!r}: losses of {known}, which are in different units"
            raise ConfigError(f"{what}; choose one with --modality, as --modality {known[0]}")
        return rows
    if modality not in known:
        has = f"it has {known}" if known else "it has no column 'modality'"
        raise ConfigError(f"{str(path)!r}: no line of modality {modality!r}; {has}; mend --modality")
    return [(line, row) for line, row in rows if row["modality"] == modality]


def _positive(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise DataError(f"{where}: expected a positive number, got {text!r}; mend the value or leave the line out")
    return value
