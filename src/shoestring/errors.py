"""The exceptions a user can meet.

ShoestringError                 exit code 1
├── UserError                   exit code 2: what was given, what is allowed, where, what to do next
│   ├── RecipeError             a recipe, a `--set` or a command-line value
│   ├── SourceError             raw images and captions
│   ├── StoreError              an encoded store: missing, foreign, of another version
│   │   └── CorruptStoreError   a shard that does not match its checksum
│   ├── CheckpointError         a run folder or checkpoint that cannot be used
│   └── OutputError             a place that cannot be written: read-only, full
└── TrainingDiverged            loss not finite or spiking; the last good checkpoint is kept
"""


class ShoestringError(Exception):
    """Base of every error raised on purpose; the command line prints it as one line."""

    exit_code = 1


class UserError(ShoestringError):
    """Something the user gave cannot be used; the message says what, where, and what to do next."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe, a `--set` assignment or a command-line value is wrong."""


class SourceError(UserError):
    """Raw images and captions cannot be read as asked."""


class StoreError(UserError):
    """A store is missing, unfinished, of another version, or made with other settings than asked."""


class CorruptStoreError(StoreError):
    """A shard does not match its checksum in the manifest."""


class CheckpointError(UserError):
    """A run folder or checkpoint cannot be used."""


class OutputError(UserError):
    """A folder or disk cannot be written."""


class TrainingDiverged(ShoestringError):
    """The loss is not finite or jumped; training stopped with the last good checkpoint kept."""
