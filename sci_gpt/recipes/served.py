"""The registered model: MLflow runs this file ("models from code") to forecast from the bytes of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from sci_gpt.errors import ConfigError
from sci_gpt.recipes.forecast import KINDS, FileOptions, forecast_payload
from sci_gpt.recipes.load import load_model


class ServedModel(mlflow.pyfunc.PythonModel):
    """Input rows: kind (netcdf, csv, miniseed), payload (the file's bytes), horizon. Output rows: kind, payload."""

    def load_context(self, context: Any) -> None:
        """Load the exported folder among the model's artifacts; MLflow wants the argument's name."""
        self._model = load_model(Path(context.artifacts["model"]))

    def predict(  # signature of mlflow.pyfunc.PythonModel
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One forecast per row; `params` are the words of the command line: quantiles, source, place, time, columns.

        Raises:
            ConfigError: a kind that is not in KINDS, or parameters that cannot be read; and as `forecast_payload`.
        """
        words = {name: str(value) for name, value in (params or {}).items() if value}
        options = FileOptions.parse(**words)
        rows = []
        for number, row in enumerate(model_input.to_dict("records")):
            if row["kind"] not in KINDS:
                raise ConfigError(f"row {number}: kind is one of {sorted(KINDS)}, got {row['kind']!r}")
            payload = forecast_payload(
                self._model,
                KINDS[row["kind"]],
                payload=row["payload"],
                horizon=int(row["horizon"]),
                options=options,
                where=f"row {number}",
            )
            rows.append({"kind": row["kind"], "payload": payload})
        return pd.DataFrame(rows)


mlflow.models.set_model(ServedModel())
