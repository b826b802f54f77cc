"""Calibration: factors on a forecast's spread below and above its median, by source, channel and lead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtri

from sci_gpt.errors import CheckpointError, ConfigError
from sci_tokenizers.variables import VARIABLES, forward_transform, inverse_transform

CALIBRATION = "calibration.json"
# Ends of the bands whose coverage the factors put right: of the 50 % band, then of the 90 % band.
LOWER, UPPER = (0.25, 0.05), (0.75, 0.95)


@dataclass(frozen=True, kw_only=True)
class SourceCalibration:
    """Factors for one source, in the transformed units of its variables.

    Attributes:
        channels: of the source; leads: in frames, ascending.
        below, above: float64 (lead, channel, 2), on the distance from the median to the quantiles at `LOWER` and
            `UPPER`; positive.
        num_windows, num_blocks: of the validation split that they were fitted on.
    """

    channels: tuple[str, ...]
    leads: tuple[int, ...]
    below: np.ndarray
    above: np.ndarray
    num_windows: int
    num_blocks: int

    def apply(
        self, quantiles: np.ndarray, *, levels: Sequence[float], leads: Sequence[int], channels: Sequence[str]
    ) -> np.ndarray:
        """Quantiles with their distances from the median stretched; the median stays, the order stays.

        Between the bands' ends the factor is linear in the normal quantile of the level, beyond them constant; for
        leads between the fitted ones the logarithm of the factor is linear in the lead. A channel that was not fitted
        stays as it is.

        Args:
            quantiles: (level, lead, frame_times, channel, row, column), physical units.
            levels: ascending, 0.5 among them.
            leads: in frames.
            channels: variable[@level] of each channel.

        Raises:
            ConfigError: no median among the levels.
        """
        if 0.5 not in levels:
            raise ConfigError(f"a calibration stretches quantiles around the median: 0.5 is not in {list(levels)}")
        out, middle = quantiles.copy(), list(levels).index(0.5)
        for v, channel in enumerate(channels):
            if channel not in self.channels:
                continue
            name = channel.partition("@")[0]
            factors = self._factors(self.channels.index(channel), levels=levels, leads=leads)[:, :, None, None, None]
            values = forward_transform(quantiles[:, :, :, v], name).astype(
                np.float64
            )  # (level, lead, frame_times, row, column)
            offsets = (values - values[middle]) * factors
            # Factors that fall faster than distances grow would let quantiles cross.
            above = np.maximum.accumulate(offsets[middle:], axis=0)
            below = np.minimum.accumulate(offsets[middle::-1], axis=0)[::-1]
            moved = values[middle] + np.concatenate([below[:-1], above])
            out[:, :, :, v] = np.clip(inverse_transform(moved, name), VARIABLES[name].minimum, VARIABLES[name].maximum)
        return out

    def _factors(self, channel: int, *, levels: Sequence[float], leads: Sequence[int]) -> np.ndarray:
        """(level, lead)."""
        ends = np.abs(ndtri(np.asarray(LOWER)))
        z = ndtri(np.asarray(levels))
        rows = []
        for lead in leads:
            sides = [
                np.exp([np.interp(lead, self.leads, np.log(part[:, channel, end])) for end in range(len(ends))])
                for part in (self.below, self.above)
            ]
            rows.append(np.where(z < 0, *(np.interp(np.abs(z), ends, side) for side in sides)))
        return np.stack(rows, axis=1)

    def as_json(self) -> dict[str, Any]:
        """Plain content, for a file."""
        return {
            "channels": list(self.channels),
            "leads": list(self.leads),
            "below": self.below.tolist(),
            "above": self.above.tolist(),
            "num_windows": self.num_windows,
            "num_blocks": self.num_blocks,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SourceCalibration:
        """From what `as_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is no such content.
        """
        channels, leads = tuple(map(str, content["channels"])), tuple(map(int, content["leads"]))
        below, above = (np.asarray(content[side], np.float64) for side in ("below", "above"))
        for part in (below, above):
            if part.shape != (len(leads), len(channels), len(LOWER)) or not (np.isfinite(part) & (part > 0)).all():
                raise ValueError(f"factors are positive, one per lead, channel and band, got shape {part.shape}")
        return cls(
            channels=channels,
            leads=leads,
            below=below,
            above=above,
            num_windows=int(content["num_windows"]),
            num_blocks=int(content["num_blocks"]),
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Factors of a model's sources, and whose they are.

    Attributes:
        step: of the checkpoint that was calibrated.
        fingerprint: of the data that it was trained on.
        sources: {source: factors}; a source without validation windows is not in it.
    """

    step: int
    fingerprint: str
    sources: Mapping[str, SourceCalibration]

    def belongs_to(self, step: int, fingerprint: str) -> bool:
        """Is it of these weights?"""
        return (self.step, self.fingerprint) == (step, fingerprint)

    def write(self, path: Path) -> None:
        """Write as JSON."""
        sources = {name: part.as_json() for name, part in self.sources.items()}
        content = {"step": self.step, "fingerprint": self.fingerprint, "sources": sources}
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read what `write` wrote.

        Raises:
            CheckpointError: a file that cannot be read, or does not hold factors.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                step=int(content["step"]),
                fingerprint=str(content["fingerprint"]),
                sources={name: SourceCalibration.from_json(part) for name, part in content["sources"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is no calibration ({type(error).__name__}: {error}); `sci-gpt evaluate` writes one"
            ) from error
