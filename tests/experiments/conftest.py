import sys
from collections.abc import Callable, Iterator

import pytest
from absl import app, flags, logging


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs an entry point as if in a fresh process: `run_command(function, *argv) -> exit code`."""
    known = set(flags.FLAGS)
    verbosity = logging.get_verbosity()

    def forget_flags() -> None:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        flags.FLAGS["verbosity"].unparse()

    def run(function: Callable[[], None], *argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["command", *argv])
        monkeypatch.setattr(app._register_and_parse_flags_with_usage, "done", False)
        with pytest.raises(SystemExit) as exit:
            function()
        forget_flags()
        return exit.value.code or 0

    yield run
    logging.set_verbosity(verbosity)
    forget_flags()
