"""What a patch is called: K-means tokens and the controls that bracket them."""
