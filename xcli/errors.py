"""The errors a user can meet, each with its exit code (README, "Exit codes")."""

from __future__ import annotations


class XaiError(Exception):
    """Something the user can act on; the message says what to do. Shown without a traceback."""

    exit_code = 2


class ConfigError(XaiError):
    """The command line or the config is wrong; nothing was run."""

    exit_code = 2


class ModelError(XaiError):
    """The model cannot be built, loaded or explained as asked; nothing was run."""

    exit_code = 2


class InputError(XaiError):
    """No image was found, or the list of images cannot be read; nothing was run."""

    exit_code = 2


class GateFailed(XaiError):
    """A gate of the config or of ``--gate`` does not hold."""

    exit_code = 4


class OutputLocked(XaiError):
    """Another run holds the lock of the output directory."""

    exit_code = 5


class OutputUnwritable(XaiError):
    """The output cannot be written: full, read-only, or not a directory."""

    exit_code = 6


class Interrupted(XaiError):
    """A signal asked the run to stop; what was committed is kept, the same command goes on."""

    def __init__(self, signum: int) -> None:
        super().__init__(
            f"interrupted by signal {signum}; finished parts are kept, run the same command to go on"
        )
        self.exit_code = 128 + signum


class MemoryExhausted(ModelError):
    """A single input does not fit into the device's memory."""
