"""Many verbs, one table, one page: targets are scored, trained and judged, and what the scores foresaw is told."""
