"""Run a command of `data`: a wrong input is one line and exit code 1."""

import os
import sys
from collections.abc import Callable


def run(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the command line; print the message of an error that asks the user to change something."""
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # of `| head`; the interpreter would say so again as it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
