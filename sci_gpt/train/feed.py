"""Feed: from n(t) to what this rank consumes in step t: micro-batches, sample keys, what could not be read."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import get_args

import numpy as np

from sci_gpt.data.curriculum import Curriculum
from sci_gpt.data.faults import cause_of
from sci_gpt.data.loader import Corpus, StepPlan, attention_cost, deal, plan_step
from sci_tokenizers.packing import Batch, Payload, collate
from sci_tokenizers.sample import Modality, Sample
from sci_tokenizers.table import make_tokenizer
from sci_tokenizers.tokenizer import TokenizerSettings
from sci_tokenizers.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """What one rank consumes in one step.

    Attributes:
        first, next_sample: n(t) and n(t + 1), the same on every rank.
        batches: micro-batches of this rank, as many as the plan accumulates.
        samples, keys: sample numbers and keys of this rank's documents, in order.
        dealt: sample numbers of every rank, to name the rows of a broken step.
        num_tokens: tokens of the whole step, over all ranks.
        passed_over: this rank's samples that could not be read; they weigh nothing.
        causes: why, one per sample passed over.
    """

    first: int
    next_sample: int
    batches: tuple[Batch, ...]
    samples: tuple[int, ...]
    keys: tuple[str, ...]
    dealt: tuple[tuple[int, ...], ...]
    num_tokens: int
    passed_over: int
    causes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Place:
    """A rank's place in the layout: rows and row length belong to the run's phases."""

    rank: int
    world: int
    accumulation: int


class StepReader:
    """Reads the rows of a step for one rank; a pure function of (t, n(t)) and where the phases began.

    Args:
        curriculum: the run's samples.
        place: this rank's.
        settings: sizes of tokens.
        threads: documents that are read and tokenized at a time; what is read does not depend on it.
    """

    def __init__(self, curriculum: Curriculum, place: Place, *, settings: TokenizerSettings, threads: int = 1) -> None:
        self.curriculum, self.place, self.threads = curriculum, place, threads
        self._empty = empty_payloads(settings)

    def __call__(self, step: int, n: int) -> StepRows:
        """The step that follows `step` completed ones and starts at sample n.

        Raises:
            DataError: a document is longer than a row.
        """
        phase, corpus = self.curriculum.at(step, n)
        place, plan = self.place, plan_step(corpus, n, rows=phase.rows, row_length=phase.row_length)
        # Each rank stands for `accumulation` neighbouring places among world x accumulation.
        shares = deal(plan, world=place.world * place.accumulation, cost=attention_cost(corpus, plan))
        mine = shares[place.rank * place.accumulation : (place.rank + 1) * place.accumulation]
        batches: list[Batch] = []
        causes: list[str] = []
        for share in mine:
            batch, missing = self._batch(corpus, plan, share=share)
            batches.append(batch)
            causes += missing
        numbers = [tuple(i for row in share for i in row) for share in shares]
        return StepRows(
            first=plan.first,
            next_sample=plan.next_sample,
            batches=tuple(batches),
            samples=tuple(i for batch in batches for i in batch.numbers),
            keys=tuple(key for batch in batches for key in batch.keys),
            dealt=tuple(
                tuple(i for share in numbers[r * place.accumulation : (r + 1) * place.accumulation] for i in share)
                for r in range(place.world)
            ),
            num_tokens=sum(corpus.length(i) for row in plan.rows for i in row),
            passed_over=len(causes),
            causes=tuple(causes),
        )

    def _batch(self, corpus: Corpus, plan: StepPlan, *, share: tuple[tuple[int, ...], ...]) -> tuple[Batch, list[str]]:
        """The micro-batch of a share of rows, and why each sample that is not in it could not be read."""
        read = self._read(corpus, [i for row in share for i in row])
        causes: list[str] = []
        for i, found in read.items():
            if not isinstance(found, Tokens):  # its place stays empty, so that the order of the others does not move
                causes.append(cause_of(found))
                print(f"warning: {self.curriculum.name(i)} is passed over: {found}", file=sys.stderr, flush=True)
        whole = {i: tokens for i, tokens in read.items() if isinstance(tokens, Tokens)}
        numbers = [[i for i in row if i in whole] for row in share]
        documents = [[whole[i] for i in row] for row in numbers]
        batch = collate(documents, plan.row_length, numbers=numbers)
        return replace(batch, payloads=self._empty | batch.payloads), causes

    def _read(self, corpus: Corpus, numbers: list[int]) -> dict[int, Tokens | Exception]:
        """The documents of samples, or why one cannot be read, in the order of `numbers`."""
        if self.threads == 1:
            return {i: _document(corpus, i) for i in numbers}
        with ThreadPoolExecutor(self.threads, thread_name_prefix="read") as pool:
            return dict(zip(numbers, pool.map(partial(_document, corpus), numbers), strict=True))


def _document(corpus: Corpus, n: int) -> Tokens | Exception:
    try:
        return corpus.document(n)
    except MemoryError:
        raise  # of this process, not of the sample
    except Exception as error:  # noqa: BLE001  readers fail in many ways, and a sample may not end a run
        return error


class Prefetch:
    """Reads the next step in a thread while this one is computed."""

    def __init__(self, read: Callable[[int, int], StepRows]) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._coming: dict[tuple[int, int], Future[StepRows]] = {}

    def begin(self, step: int, n: int) -> None:
        """Start reading a step before it is asked for: a run's first one is read while its engine is made."""
        self._coming = {(step, n): self._pool.submit(self._read, step, n)}

    def get(self, step: int, n: int) -> tuple[StepRows, float]:
        """The step that follows `step` completed ones and starts at sample n, and the seconds waited for it."""
        start = time.monotonic()
        if (step, n) not in self._coming:
            self.begin(step, n)
        rows = self._coming[step, n].result()
        waited = time.monotonic() - start
        self.begin(step + 1, rows.next_sample)
        return rows, waited

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def empty_payloads(settings: TokenizerSettings) -> dict[str, Payload]:
    """A payload of no tokens for each modality.

    A batch gets it for a modality that it lacks. Modules then run on no tokens at all and still get a gradient (of
    zeros): otherwise a rank whose rows lack a modality would leave its parameters out, and ZeRO's collectives would
    deadlock.
    """
    payloads = {}
    for name in get_args(Modality):
        tokenizer = make_tokenizer(name, settings)
        sample = _smallest_sample(name, times=2 * tokenizer.frame_times, side=settings.grid_patch)
        tokens = tokenizer.encode(sample, num_context=1, leads=(1,), statistics=None)
        one = collate([[tokens]], tokens.num_tokens).payloads[name]
        payloads[name] = Payload(**{field.name: getattr(one, field.name)[:0] for field in fields(Payload)})
    return payloads


def _smallest_sample(modality: Modality, *, times: int, side: int) -> Sample:
    """A sample of zeros from which only the shapes of its tokens are taken."""
    place = (side, side) if modality == "grid" else (1, 1)
    phase = np.zeros(times, np.float32)
    latitude, longitude = (axis.astype(np.float32) for axis in np.indices(place))  # a grid's spacing must not be 0
    return Sample(
        key="none/none",
        source="none",
        modality=modality,
        variables=("digitizer_counts_vertical" if modality == "trace" else "air_temperature",),
        levels=(np.nan,),
        values=np.zeros((times, 1, *place), np.float32),
        valid=np.ones((times, 1, *place), bool),
        time=np.arange(times, dtype=np.float64),
        year_phase=phase,
        day_phase=phase,
        step_seconds=1.0,
        latitude=latitude,
        longitude=longitude,
        elevation=np.zeros(place, np.float32),
    )
