"""Pictures and pages: figures, picture sheets, self-contained HTML."""
