"""Curriculum: a run as a list of phases, with the mixture and rows of each step; sources go on in their epochs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from sci_gpt.data.loader import Corpus
from sci_gpt.data.order import PERIOD
from sci_gpt.data.store import Store
from sci_gpt.data.windows import WindowSpec
from sci_gpt.errors import DataError
from sci_tokenizers.tokenizer import TokenizerSettings


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run.

    Attributes:
        until_step: completed steps at its end.
        rows, row_length: of its steps.
        specs: its mixture.
    """

    until_step: int
    rows: int
    row_length: int
    specs: tuple[WindowSpec, ...]


class Curriculum:
    """The numbered samples of a run over its phases.

    Numbers go on from phase to phase. So does each source in its epochs: what earlier phases have given of the same
    windows (source, frames, stride) is counted on, so that no window is skipped or comes twice because a phase began.
    Windows of another shape are another set, and begin an epoch of their own.

    Where a phase begins is known only when the run gets there: `starts` of a checkpoint are the first samples of the
    phases that it has begun. They and n(t) are the whole state.

    Args:
        store: the built store.
        phases: in order.
        seed, settings, shuffle_block, shuffle_time: see `Corpus`.
        starts: where the phases of the resumed run began; the first is 0.

    Raises:
        DataError: a source or a window that the store has not, or a document longer than a row of its phase.
    """

    def __init__(
        self,
        store: Store,
        phases: Sequence[Phase],
        *,
        seed: int,
        settings: TokenizerSettings,
        shuffle_block: int = PERIOD,
        shuffle_time: bool = False,
        starts: Sequence[int] = (0,),
    ) -> None:
        self.store, self.phases = store, tuple(phases)
        self.corpora = [
            Corpus(
                store, phase.specs, seed=seed, settings=settings, shuffle_block=shuffle_block, shuffle_time=shuffle_time
            )
            for phase in phases
        ]
        for number in range(len(self.phases)):
            self._refuse_long_documents(number)
        self._ends = [phase.until_step for phase in phases]
        self._starts = [0]
        self._given: dict[tuple[str, int, int], int] = {}
        for n in starts[1:]:
            self._begin(n)

    def at(self, step: int, n: int) -> tuple[Phase, Corpus]:
        """The phase of the step that follows `step` completed ones and takes samples from n on, with its samples.

        Steps are asked for in order: the first step of a phase says where the phase begins.

        Raises:
            ValueError: a step beyond the run, of a phase that was not begun, or one that began at another sample.
        """
        number = bisect_right(self._ends, step)
        if number == len(self.phases):
            raise ValueError(f"the phases have steps 0..{self._ends[-1] - 1}, got {step}")
        opening = number > 0 and step == self._ends[number - 1]
        if opening and number == len(self._starts):
            self._begin(n)
        if number >= len(self._starts) or (opening and self._starts[number] != n):
            raise ValueError(f"step {step}, sample {n}: the phases began at samples {self._starts}")
        return self.phases[number], self.corpora[number]

    def starts(self, step: int) -> tuple[int, ...]:
        """First samples of the phases of which `step` completed steps have taken something."""
        return tuple(self._starts[: 1 + sum(end < step for end in self._ends[:-1])])

    def name(self, n: int) -> str:
        """A sample number with its source and window, for messages (nothing is read)."""
        corpus = self.corpora[bisect_right(self._starts, n) - 1]
        source, window, _ = corpus.order.sample(n)
        return f"sample {n} ({corpus.specs[source].source} window {window})"

    def _begin(self, n: int) -> None:
        """The next phase begins at sample n: what the one before it has given is counted."""
        number = len(self._starts)
        before, corpus = self.corpora[number - 1], self.corpora[number]
        self._given |= dict(zip(map(_windows_of, before.specs), before.order.given_until(n), strict=True))
        self.corpora[number] = corpus.begun(n, [self._given.get(_windows_of(spec), 0) for spec in corpus.specs])
        self._starts.append(n)

    def _refuse_long_documents(self, number: int) -> None:
        phase, corpus = self.phases[number], self.corpora[number]
        for spec, length in zip(corpus.specs, corpus.lengths, strict=True):
            if length > phase.row_length:
                raise DataError(
                    f"phases.{number}: documents of source {spec.source!r} ({spec.frames} frames) have {length} tokens,"
                    f" a row holds {phase.row_length}: raise row_length or cut its frames"
                )


def _windows_of(spec: WindowSpec) -> tuple[str, int, int]:
    """What a source's windows depend on: two phases that agree in it draw from one set."""
    return spec.source, spec.frames, spec.stride
