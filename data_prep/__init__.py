"""Offline jobs that turn pictures and captions into shards."""
