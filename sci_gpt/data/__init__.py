"""Readers, splits, statistics, shards, order and loader: from archives to rows."""
