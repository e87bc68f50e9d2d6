"""Images that lie in shards and are read from the front: webdataset tars, and what Hugging Face `datasets` streams."""
