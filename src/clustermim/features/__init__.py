"""What a patch is described by: pixels, and the features of a backbone."""
