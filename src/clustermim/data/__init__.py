"""Where images come from: sources, splits, views, masks and batches."""
