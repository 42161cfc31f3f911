import copy
import json
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
        (
            "--config.widht=16",
            "unknown key config.widht: did you mean 'width'. known are nested, wi",
        ),
        ("--config.nested.rat=1", "unknown key config.nested.rat: did you mean 'rate'. known are"),
        ("--config.nestde.rate=1", "unknown key config.nestde: did you mean 'nested'"),
        ("--config.width.x=1", "--config.width.x: config.width is 8, give it as a whole"),
        ("--config.nested[0]=1", "unknown key config.nested.0: known are rate"),
        ("--config.width=wide", ".*width.*wide"),
        ("--wokdir=x", "Unknown command line flag 'wokdir'. Did you mean: workdir"),
        ("workdir=x", "unexpected argument 'workdir=x': options begin with --"),
    ],
)
def test_bad_flags(run_command, entry_point, seen, capsys, argument, message):
    assert run_command(entry_point, argument) == 2
    assert re.match(message, one_error(capsys))
    assert seen == {}


OPTIONS_FILE = """
from ml_collections import ConfigDict


def get_config(variant="a"):
    if variant != "a":
        raise ValueError(f"no variant {variant!r}: choose a")
    optimizer = {"name": "soap", "epsilon": None, "options": {"block_size": 8}}
    return ConfigDict({"optimizer": optimizer, "optimizers": {"SOAP": optimizer}})
"""


@pytest.fixture
def write_config(tmp_path):
    def write(text):
        path = tmp_path / "given.py"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["block_size=12", "eps=1e-6"], {"block_size": 12, "eps": 1e-6}),
        (["block_size=None", "stagger=false"], {"block_size": None, "stagger": False}),
        (
            ["weight_decay_scaling=constant", "learning_rate_scaling=1/width"],
            {
                "block_size": 8,
                "weight_decay_scaling": "constant",
                "learning_rate_scaling": "1/width",
            },
        ),
    ],
)
@pytest.mark.parametrize("path", ["optimizer", "optimizers.SOAP"])
@pytest.mark.parametrize("name_is_last", [False, True])
def test_options_of_an_optimizer(run_command, write_config, arguments, options, path, name_is_last):
    seen = {}

    def main(values):
        given = copy.deepcopy(values.config)
        seen.update((given if path == "optimizer" else given.optimizers).to_dict())

    flags_given = [f"--config.{path}.options.{argument}" for argument in arguments]
    flags_given.insert(len(flags_given) if name_is_last else 0, f"--config.{path}.name=shampoo")
    config = str(write_config(OPTIONS_FILE))
    run = lambda: command.run(main, config="unused.py", workdir="")
    assert run_command(run, f"--config={config}", *flags_given) == 0
    optimizer = seen[path.rpartition(".")[2]]
    assert optimizer == {"name": "shampoo", "epsilon": None, "options": options}
    json.dumps(seen)


def test_what_is_none_can_be_set(run_command, write_config):
    seen = {}
    config = str(write_config(OPTIONS_FILE))
    run = lambda: command.run(lambda v: seen.update(v.config.optimizer), config=config, workdir="")
    assert run_command(run, "--config.optimizer.epsilon=1e-6") == 0
    assert seen["epsilon"] == 1e-6


@pytest.mark.parametrize(
    ("text", "variant", "message"),
    [
        (OPTIONS_FILE, ":b", "line 7: no variant 'b': choose a"),
        (CONFIG_FILE, ":b", "it has no variants, leave out the colon and what follows"),
        ("import nonesuch", "", "line 1: ModuleNotFoundError: No module named 'nonesuch'"),
        ("def get_config(", "", "SyntaxError: .*given.py, line 1"),
        ("def get_config():\n    return 1 / 0", "", "line 2: ZeroDivisionError: division by zero"),
        ("def get_config(): pass", "", r"get_config\(\) returns None, not a ConfigDict"),
        ("", "", "AttributeError: module .* has no attribute 'get_config'"),
    ],
)
def test_configuration_file_with_an_error(
    run_command, write_config, capsys, text, variant, message
):
    path = f"{write_config(text)}{variant}"
    run = lambda: command.run(lambda _: None, config="unused.py", workdir="")
    assert run_command(run, f"--config={path}") == 2
    assert re.match(f"--config={re.escape(path)}: {message}", one_error(capsys))


def test_missing_configuration_file(run_command, entry_point, config_file, capsys):
    folder = config_file.parent
    for path, hint in (
        (folder / "missing.py", f"{folder} has config.py"),
        (folder, f"{folder} has config.py"),
        (folder / "nowhere" / "missing.py", f"and no folder {folder / 'nowhere'}"),
    ):
        assert run_command(entry_point, f"--config={path}") == 2
        assert one_error(capsys) == f"--config={path}: no such Python file, {hint}"


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
