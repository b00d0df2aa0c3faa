"""From what went wrong to one plain message on stderr and an exit code; a traceback only for our own mistakes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from xcli.errors import OutputUnwritable, XaiError

INTERNAL = 1
REPORT = "this is a bug in xai, not in your input; please report it with the lines above"


def guarded(run: Callable[[], object]) -> int:
    """Run the command line and turn its end into an exit code."""
    try:
        run()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the command line library meets it first
            return reader_left()
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except XaiError as error:
        say_error(str(error))
        if "--json" in sys.argv[1:]:
            told = {"status": "error", "exit_code": error.exit_code, "message": str(error)}
            with suppress(OutputUnwritable, BrokenPipeError):  # the exit code tells it, too
                print(json.dumps(told), flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        say_error("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return reader_left()
    except Exception:  # noqa: BLE001 - the last frame of the program: whatever it is, say so and exit with 1
        traceback.print_exc()
        say_error(REPORT)
        return INTERNAL
    return 0


def reader_left() -> int:
    """The reader of our output is gone, as `head` is after some lines: say nothing more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def say_error(text: str) -> None:
    """The text as an error of the terminal or of the log; several lines follow as they are, so that file:line:column
    starts a line."""
    from xcli.durable import shown
    from xcli.progress import stamp

    begin = "xai: error:" if sys.stderr.isatty() else stamp(time.time(), "ERROR")
    lines = [shown(line) for line in text.split("\n")]
    print(
        f"{begin} {lines[0]}" if len(lines) == 1 else "\n".join([begin, *lines]), file=sys.stderr, flush=True
    )
