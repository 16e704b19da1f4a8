"""The error that means "the user's input is wrong": one line, exit status 2."""


class InputError(ValueError):
    """Bad input. Its message is one line that names the file, the key or the row, and what would be right."""


class ResourceError(RuntimeError):
    """Something the run needs (a GPU, a port, disk space, an engine's answer) is not there. One line, exit status 2."""
