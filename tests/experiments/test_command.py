import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags, logging

from experiments import command

ROOT = Path(__file__).parents[2]

CONFIG_FILE = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({"width": 8, "nested": {"rate": 0.5}})
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG_FILE)
    return path


@pytest.fixture
def seen():
    return {}


@pytest.fixture
def entry_point(config_file, seen):
    def main(values):
        seen.update(config=values.config.to_dict(), workdir=values.workdir)

    return lambda: command.run(main, config=str(config_file), workdir="runs/default")


def one_error(capsys):
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.endswith("\n")
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")
    return errors.removeprefix("error: ").strip()


def test_defaults(run_command, entry_point, seen, capsys):
    assert run_command(entry_point) == 0
    assert seen == {"config": {"width": 8, "nested": {"rate": 0.5}}, "workdir": "runs/default"}
    assert capsys.readouterr() == ("", "")


def test_overrides(run_command, entry_point, seen):
    flags_given = ["--config.width=16", "--config.nested.rate=2", "--workdir=elsewhere"]
    assert run_command(entry_point, *flags_given) == 0
    assert seen == {"config": {"width": 16, "nested": {"rate": 2.0}}, "workdir": "elsewhere"}


def test_flags_of_one_command(run_command, config_file, seen):
    def entry_point():
        command.run(
            lambda values: seen.update(mode=values.mode),
            config=str(config_file),
            workdir="",
            define_flags=lambda: flags.DEFINE_enum("mode", "run", ["run", "plan"], "What to do."),
        )

    assert run_command(entry_point, "--mode=plan") == 0
    assert seen == {"mode": "plan"}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.widht=16", "no such key in the configuration: .*widht.*--config.widht=16"),
        ("--config.nested.rat=1", "no such key in the configuration: .*rat.*"),
        ("--config.width=wide", ".*width.*wide"),
        ("--config=missing.py", ".*missing.py"),
        ("--wokdir=x", "Unknown command line flag 'wokdir'. Did you mean: workdir"),
        ("workdir=x", "unexpected argument 'workdir=x': options begin with --"),
    ],
)
def test_bad_flags(run_command, entry_point, seen, capsys, argument, message):
    assert run_command(entry_point, argument) == 2
    assert re.match(message, one_error(capsys))
    assert seen == {}


@pytest.mark.parametrize(
    "error",
    [ValueError("width=3:\n  choose 4\n"), OSError("width=3: choose 4")],
    ids=["ValueError", "OSError"],
)
def test_errors_of_main_are_one_line(run_command, config_file, capsys, error):
    def main(values):
        raise error

    entry_point = lambda: command.run(main, config=str(config_file), workdir="")
    assert run_command(entry_point) == 2
    assert one_error(capsys) == "width=3: choose 4"


def test_quoted_names_stay_quoted(run_command, config_file, capsys):
    def main(values):
        raise ValueError("'adamw' is missing from 'optimizers'")

    assert run_command(lambda: command.run(main, config=str(config_file), workdir="")) == 2
    assert one_error(capsys) == "'adamw' is missing from 'optimizers'"


def test_bugs_keep_their_traceback(run_command, config_file):
    def main(values):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(lambda: command.run(main, config=str(config_file), workdir=""))


@pytest.mark.parametrize(
    ("arguments", "level"), [([], logging.ERROR), (["--verbosity=0"], logging.INFO)]
)
def test_libraries_log_errors_only_unless_asked(run_command, config_file, arguments, level):
    seen = []

    def main(values):
        seen.append(logging.get_verbosity())

    run_command(lambda: command.run(main, config=str(config_file), workdir=""), *arguments)
    assert seen == [level]


def test_as_a_process(tmp_path):
    """No warning, log line or traceback stands beside the error, and nothing is left behind."""
    arguments = ["--config.model.width=33", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: width=33 is not a multiple of head_dim=8: choose width 32 or 40\n"
    )
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()
