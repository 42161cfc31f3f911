"""What all entry points share: their flags, and errors as one line."""

import errno
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags


def run(
    main: Callable[[Any], int | None],
    *,
    config: str,
    workdir: str,
    define_flags: Callable[[], None] | None = None,
) -> None:
    """Parses the command line and ends the program with the exit code of `main(flags.FLAGS)`.

    A ValueError or an OSError ends the program with one line on stderr and exit code 2.

    Args:
      main: reads `config` (a ConfigDict), `workdir` and the flags of `define_flags`; its None is
        exit code 0.
      config: default of --config.
      workdir: default of --workdir.
      define_flags: defines further flags.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            config_flags.DEFINE_config_file("config", config, "Configuration file.")
            flags.DEFINE_string("workdir", workdir, "Folder for all that is written.")
            if define_flags:
                define_flags()
            rest = flags.FLAGS(argv)
            _ = flags.FLAGS.config  # a file that did not load says so when it is read
            if flags.FLAGS["verbosity"].using_default_value:
                logging.set_verbosity(logging.ERROR)
        except (AttributeError, KeyError) as error:  # an override of a key that is not there
            overrides = " ".join(a for a in argv if a.startswith("--config."))
            _fail(f"no such key in the configuration: {_one_line(error)} ({overrides})")
        except (flags.Error, OSError, ValueError) as error:
            _fail(_one_line(error))
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}: options begin with --")
        return rest

    def guarded(_: list[str]) -> int | None:
        try:
            return main(flags.FLAGS)
        except (OSError, ValueError) as error:
            _fail(_one_line(error))
        except KeyboardInterrupt:
            print("\ninterrupted: the same command goes on from here", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=parse)


def _one_line(error: BaseException) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC:
        return f"the disk is full ({error}): make room, then the same command goes on from here"
    text = error.args[0] if isinstance(error, KeyError) else str(error)
    return re.sub(r"\s+", " ", text).strip()


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
