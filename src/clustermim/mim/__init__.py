"""Learning from the names: masked image modelling."""
