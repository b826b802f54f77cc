"""Tasks, metrics, baselines, scores and the report."""
