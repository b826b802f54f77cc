"""Build, pretrain, forecast: from a configuration to the work."""
