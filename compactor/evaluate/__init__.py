"""Knows how good a compacted cache is, on questions with answers of the full cache. Knows no solver."""
