"""The errors a user can cause. Command line tools print their text in one line and exit with status 2; nothing
else is hidden."""


class MtlRcnnError(Exception):
    """Base of all errors whose text alone tells the user what is wrong, where, and how to fix it."""


class ConfigError(MtlRcnnError):
    """A configuration that cannot be run: unknown key, unknown task, a value that contradicts another."""


class DataError(MtlRcnnError):
    """A fault in a dataset: names the file, the image id, the annotation id, what was expected and how to fix it."""


class UnreadableImageError(DataError):
    """An image file that is missing, truncated or of another size than its record; `data.on_error=skip` replaces it.

    Attributes:
        kind: what is wrong in a few words, the same for all files with this fault.
    """

    def __init__(self, message: str, kind: str = "unreadable image") -> None:
        super().__init__(message)
        self.kind = kind


class CheckpointError(MtlRcnnError):
    """A checkpoint that cannot be read or does not fit the network."""


class ExportError(MtlRcnnError):
    """An exported network that fails its certificate, or cannot be written."""


class TrainingError(MtlRcnnError):
    """Training that cannot go on, such as a loss that is not finite: names the rank, the task and the image ids."""


class LoaderError(MtlRcnnError):
    """A loader's worker process that ended: names the image it was at."""


class StepError(RuntimeError):
    """A step of training or evaluation that failed in a way that nobody foresaw: names the image ids and, in training,
    the rank, the task and the file that replays the batch. Not the user's to mend: its traceback is shown."""
