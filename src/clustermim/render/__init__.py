"""Pictures and pages: figures, picture sheets, self-contained HTML. Arrays and numbers in, PNG, SVG and HTML out."""
