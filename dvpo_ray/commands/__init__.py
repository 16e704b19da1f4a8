"""The `dvpo` commands: argument parsing, `--dry-run`, and a call of the part of the package that does the work."""
