"""Duplicates: content that stands in two splits is refused, under whatever name and from whatever offset on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sci_gpt.data.near_duplicates import NearDuplicates
from sci_gpt.errors import DataError
from sci_tokenizers.sample import Sample

BLOCK_TIMES = 32  # times in a block
BLOCK_CELLS = 16  # cells of a time that stand for it in a block
_DIGEST = np.dtype("S16")


@dataclass(frozen=True, kw_only=True)
class DuplicateGuard:
    """Refuses content that stands in two splits of the corpus; nearly identical content too (see `NearDuplicates`).

    For copies to the last bit held-out stretches are remembered at every offset, training stretches at every
    BLOCK_TIMES-th: a common piece of 2 * BLOCK_TIMES - 1 times is found. Blocks that are constant or mostly missing are
    not compared. Of a held-out time 16 bytes are kept, of a training time half a byte.

    What several processes saw is saved, loaded and merged in the order of the corpus.
    """

    _pieces: list[tuple[str, str]] = field(default_factory=list, repr=False)
    _blocks: list[np.ndarray] = field(default_factory=list, repr=False)
    _near: NearDuplicates = field(default_factory=NearDuplicates, repr=False)

    def add(self, sample: Sample, split: str) -> None:
        """Take one stretch in."""
        self._near.add(sample, split)
        self._pieces.append((sample.key, split))
        self._blocks.append(np.array(_digests(sample, BLOCK_TIMES if split == "train" else 1), _DIGEST))

    def merge(self, other: DuplicateGuard) -> None:
        """Take in what another process has seen."""
        self._near.merge(other._near)
        self._pieces.extend(other._pieces)
        self._blocks.extend(other._blocks)

    def save(self, path: Path) -> None:
        """Write what was seen (.npz, nothing pickled)."""
        counts = np.array([len(blocks) for blocks in self._blocks], np.int64)
        said = np.frombuffer(json.dumps(self._pieces).encode(), np.uint8)
        blocks = np.concatenate([*self._blocks, np.zeros(0, _DIGEST)])
        with path.open("wb") as file:
            arrays = {"pieces": said, "counts": counts, "blocks": blocks} | self._near.arrays()
            np.savez(file, **arrays)  # type: ignore[arg-type]  # names are no options

    @classmethod
    def load(cls, path: Path) -> DuplicateGuard:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            pieces = [(str(key), str(split)) for key, split in json.loads(arrays["pieces"].tobytes())]
            blocks = np.split(arrays["blocks"], np.cumsum(arrays["counts"])[:-1]) if pieces else []
            return cls(_pieces=pieces, _blocks=blocks, _near=NearDuplicates.of_arrays(arrays, pieces))

    def check(self) -> None:
        """Compare the splits, when all stretches are in.

        Raises:
            DataError: the same content in two splits, or nearly the same; both keys are named.
        """
        held = [number for number, (_, split) in enumerate(self._pieces) if split != "train"]
        blocks, piece = self._joined(held)
        order = np.argsort(blocks, kind="stable")
        blocks, piece = blocks[order], piece[order]
        if len(blocks):
            self._check_held_out(blocks, piece)
            for number, (_, split) in enumerate(self._pieces):
                if split == "train" and len(self._blocks[number]):
                    at = np.minimum(np.searchsorted(blocks, self._blocks[number]), len(blocks) - 1)
                    alike = np.flatnonzero(blocks[at] == self._blocks[number])
                    if len(alike):
                        self._refuse(number, int(piece[at[alike[0]]]))
        self._near.check()

    def _joined(self, pieces: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of some pieces, and the piece of each."""
        blocks = np.concatenate([*(self._blocks[number] for number in pieces), np.zeros(0, _DIGEST)])
        return blocks, np.repeat(np.array(pieces, np.int64), [len(self._blocks[number]) for number in pieces])

    def _check_held_out(self, blocks: np.ndarray, piece: np.ndarray) -> None:
        """Validation against test; `blocks` are sorted, equal ones in the order of their pieces."""
        tests = np.array([split == "test" for _, split in self._pieces])[piece]
        begins = np.append(True, blocks[1:] != blocks[:-1])
        first = np.maximum.accumulate(np.where(begins, np.arange(len(blocks)), 0))
        other = np.flatnonzero(tests != tests[first])
        if len(other):
            worst = other[np.argmin(piece[other])]
            self._refuse(int(piece[first[worst]]), int(piece[worst]))

    def _refuse(self, one: int, two: int) -> None:
        (key, split), (other, other_split) = self._pieces[one], self._pieces[two]
        raise DataError(
            f"{key!r} ({split}) and {other!r} ({other_split}) hold the same values; leave one of the two out"
        )


def _digests(sample: Sample, step: int) -> list[bytes]:
    times = sample.num_times
    size = min(BLOCK_TIMES, times)
    cells = np.ascontiguousarray(sample.values.reshape(times, -1))
    known = sample.valid.reshape(times, -1)
    chosen = np.unique(np.linspace(0, cells.shape[1] - 1, BLOCK_CELLS).astype(int))
    cells, known = np.ascontiguousarray(cells[:, chosen]), known[:, chosen]
    mostly = np.convolve(known.mean(axis=1), np.ones(size), "valid") / size >= 0.5 * known.any(axis=0).mean()
    changes = np.concatenate([[0], np.cumsum((np.diff(cells, axis=0) != 0).any(axis=1))])
    moving = changes[size - 1 :] - changes[: times - size + 1] >= size // 4
    starts = [start for start in range(0, times - size + 1, step) if mostly[start] and moving[start]]
    return [hashlib.blake2b(cells[start : start + size].tobytes(), digest_size=16).digest() for start in starts]
