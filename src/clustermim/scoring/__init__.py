"""How good the names are, before any training: TCAS and its companions."""
