"""The error that means "the user's input is wrong": one line, exit status 2."""


class InputError(ValueError):
    """Bad input. Its message is one line that names the file, the key or the row, and what would be right."""


class ResourceError(RuntimeError):
    """Something that the run needs is missing: a GPU, a port, disk space, an engine's answer. One line, exit status 2."""


class DiskFull(ResourceError):
    """The disk that something is written to has no room left."""


class HeadGone(ResourceError):
    """The Ray cluster that a run is in has ended."""


class RoleDied(ResourceError):
    """An actor's process is gone.

    Attributes:
        actor: its name, for example `rollout-0`.
    """

    def __init__(self, message: str, actor: str) -> None:
        super().__init__(message)
        self.actor = actor


def diverged(finding: str, section: str) -> ResourceError:
    """The error of a training that has diverged.

    Args:
        finding: which number is not finite, and when.
        section: of the config, whose `learning_rate` it is.
    """
    return ResourceError(f"training has diverged: {finding}; lower {section}.learning_rate and start anew")
