"""Doors out: an encoder as the neighbours load it without us. One file a format, one line each in `formats.py`."""
