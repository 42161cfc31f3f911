"""What all entry points share: their flags, and errors as one line."""

import errno
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, FieldReference, config_flags
from ml_collections.config_flags import config_path

from mup_jax.training.config import check_known


def run(
    main: Callable[[Any], int | None],
    *,
    config: str,
    workdir: str,
    define_flags: Callable[[], None] | None = None,
    amend: Callable[[ConfigDict, list[str]], None] | None = None,
) -> None:
    """Parses the command line and ends the program with the exit code of `main(flags.FLAGS)`.

    A ValueError or an OSError ends the program with one line on stderr and exit code 2.

    Args:
      main: reads `config` (a ConfigDict), `workdir` and the flags of `define_flags`; its None is
        exit code 0.
      config: default of --config.
      workdir: default of --workdir.
      define_flags: defines further flags.
      amend: changes the configuration of the file by the command line, before --config.KEY does.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            config_flags.DEFINE_config_file("config", None, "Configuration file.")
            flags.FLAGS["config"].parser = _ConfigFile(argv, amend)
            flags.FLAGS.set_default("config", config)
            flags.DEFINE_string("workdir", workdir, "Folder for all that is written.")
            if define_flags:
                define_flags()
            rest = flags.FLAGS(argv)
            if flags.FLAGS["verbosity"].using_default_value:
                logging.set_verbosity(logging.ERROR)
        except (flags.Error, OSError, ValueError) as error:
            _fail(_one_line(error))
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}: options begin with --")
        if Path(flags.FLAGS.workdir).is_file():
            _fail(f"--workdir={flags.FLAGS.workdir} is a file: give a folder")
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


class _ConfigFile(flags.ArgumentParser):
    """Loads the file of --config; whatever is wrong with it or its overrides is a flags.Error.

    Args:
      argv: the command line, whose `--config.KEY` are to be set.
      amend: see `run`.
    """

    syntactic_help = "the path of a Python file with get_config(), then perhaps :VARIANT"

    def __init__(
        self, argv: list[str], amend: Callable[[ConfigDict, list[str]], None] | None = None
    ):
        super().__init__()
        self._argv, self._amend = argv, amend
        matches = (re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in argv)
        self._overrides = [match[1] for match in matches if match]

    def parse(self, argument: str) -> ConfigDict:
        file, colon, variant = argument.partition(":")
        if not (Path(file).is_file() and file.endswith(".py")):
            raise flags.Error(
                f"--config={argument}: no such Python file, {_files_near(Path(file))}"
            )
        try:
            get_config = _load(file).get_config
            if colon and not inspect.signature(get_config).parameters:
                raise ValueError("it has no variants, leave out the colon and what follows")
            config = get_config(*([variant] if colon else []))
            if not isinstance(config, ConfigDict):
                raise ValueError(f"get_config() returns {config!r}, not a ConfigDict")
        except Exception as error:
            raise flags.Error(f"--config={argument}: {_place(error, file)}") from error
        try:
            if self._amend:
                self._amend(config, self._argv)
            for override in self._overrides:
                _make_settable(config, override)
        except ValueError as error:
            raise flags.Error(str(error)) from error
        return config.lock()


def _files_near(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"and no folder {folder}"
    files = ", ".join(sorted(file.name for file in folder.glob("*.py")))
    return f"{folder} has {files or 'none'}"


def _load(file: str) -> Any:
    spec: Any = importlib.util.spec_from_file_location("config_file", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _place(error: Exception, file: str) -> str:
    """What a configuration file says, preceded by its line where that is known."""
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == Path(file).absolute()]
    return f"line {lines[-1]}: {name}{error}" if lines else f"{name}{error}"


def _make_settable(config: ConfigDict, override: str) -> None:
    """Lets a flag set any option of an optimizer, and what is None, to a value of any type.

    Raises:
      ValueError: the configuration has no such key; all options are let in, `validate` knows them.
    """
    path, holder = "config", config
    *parents, key = map(str, config_path.split(override))
    for parent in parents:
        check_known([parent], holder, path)
        path, holder = f"{path}.{parent}", holder[parent]
        if not isinstance(holder, ConfigDict):
            raise ValueError(f"--config.{override}: {path} is {holder!r}, give it as a whole")
    is_option = parents[-1:] == ["options"]
    if not is_option:
        check_known([key], holder, path)
    if is_option or holder[key] is None:
        value = holder.get(key)
        with holder.ignore_type():
            holder[key] = FieldReference(value, field_type=object)


def _one_line(error: BaseException) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC:
        return f"the disk is full ({error}): make room, then the same command goes on from here"
    return re.sub(r"\s+", " ", str(error)).strip()


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
