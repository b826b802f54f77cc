"""A model whose quantiles are stretched by the calibration that its evaluation fitted on validation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sci_gpt.errors import CheckpointError, ConfigError
from sci_gpt.model.calibration import CALIBRATION, Calibration
from sci_gpt.model.predict import Predictor
from sci_gpt.recipes.load import MODEL_JSON, LoadedModel, load_model, model_folder
from sci_tokenizers.sample import Sample


class CalibratedPredictor(Predictor):
    """A predictor whose quantiles went through a calibration.

    Args:
        plain: gives the quantiles.
        calibration: of the same model.
    """

    def __init__(self, plain: Predictor, calibration: Calibration) -> None:
        super().__init__(plain.model, plain.settings, statistics=plain.statistics)
        self.calibration = calibration

    def quantiles(
        self, samples: Sequence[Sample], *, num_context: int, leads: tuple[int, ...], levels: tuple[float, ...]
    ) -> list[np.ndarray]:
        """As `Predictor.quantiles`, calibrated.

        Raises:
            ConfigError: a sample of a source that was not calibrated.
        """
        known = self.calibration.sources
        for sample in samples:
            if sample.source not in known:
                raise ConfigError(
                    f"{sample.key!r} is of source {sample.source!r}, and this model was calibrated for "
                    f"{', '.join(known) or 'none'}; name one of these as the data's source (--source), or forecast "
                    "without calibration"
                )
        every = tuple(sorted({*levels, 0.5}))
        wanted = [every.index(level) for level in levels]
        arrays = super().quantiles(samples, num_context=num_context, leads=leads, levels=every)
        return [
            known[sample.source].apply(array, levels=every, leads=leads, channels=sample.channels)[wanted]
            for sample, array in zip(samples, arrays, strict=True)
        ]

    def trajectories(
        self, samples: Sequence[Sample], *, num_context: int, num_frames: int, num_samples: int, seed: int
    ) -> list[np.ndarray]:
        """Refused: a calibration is of quantiles.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"num_samples={num_samples} of a calibrated model: a calibration stretches quantiles, value by value and "
            "lead by lead, and trajectories would come out as they were; ask for quantiles, or leave calibration "
            "(calibrated=True, --calibrated) out"
        )


def load_calibrated(uri: str | Path, *, tracking_uri: str | None = None) -> LoadedModel:
    """As `load_model`, with the calibration that `sci-gpt evaluate` wrote for these weights.

    Raises:
        CheckpointError: no calibration, or one of other weights; and as `load_model`.
    """
    folder = model_folder(uri, tracking_uri=tracking_uri)
    loaded = load_model(folder)
    path = calibration_path(folder)
    if not path.exists():
        raise CheckpointError(
            f"{str(uri)!r} has no calibration (no file {str(path)!r}); `sci-gpt evaluate` on its run writes one, and "
            "`sci-gpt export` takes it along"
        )
    calibration = Calibration.read(path)
    if not calibration.belongs_to(loaded.step, loaded.fingerprint):
        raise CheckpointError(
            f"{path} is of step {calibration.step}, data {calibration.fingerprint[:12]}, and the model is of step "
            f"{loaded.step}, data {loaded.fingerprint[:12]}; run `sci-gpt evaluate` again"
        )
    return replace(loaded, predictor=CalibratedPredictor(loaded.predictor, calibration))


def calibration_path(folder: Path) -> Path:
    """Where the calibration of an exported folder, or of a checkpoint in its run, lies."""
    if (folder / MODEL_JSON).exists():
        return folder / CALIBRATION
    return folder.resolve().parents[1] / "report" / CALIBRATION
