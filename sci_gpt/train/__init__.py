"""Trainer, checkpoint, schedule and tracker."""
