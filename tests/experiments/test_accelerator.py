"""The command for an accelerator: its session with cases that measure nothing, and a tiny one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import ladder_gpu
from experiments.accelerator import checks, ladder, report, training, updates
from experiments.accelerator.__main__ import PARTS, make_parts
from experiments.accelerator.session import Case, Cut, Part, Session, Unavailable
from experiments.ladder.plan import Ladder
from mup_jax.transforms.linalg import use_paths_of

ROOT = Path(__file__).parents[2]
IDENTITY = {"device": "abacus", "jax": "0", "scale": "tiny"}


class Clock:
    """Seconds that pass when told so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Desk:
    """Sessions of one folder, whose cases take seconds of a clock, and what they measured."""

    def __init__(self, folder):
        self.folder, self.clock, self.measured = folder, Clock(), []

    def part(self, name, share=1.0, **seconds):
        cases = [Case(case, guess, self._measure(case, guess)) for case, guess in seconds.items()]
        return Part(name, f"Part {name}", share, cases, [report.number("answer", "answer")])

    def _measure(self, case, guess):
        def measure(seconds):
            self.measured.append(case)
            self.clock.now += guess
            return {"answer": 42}

        return measure

    def session(self, *parts, minutes=10.0, identity=IDENTITY):
        write = report.writer("command")
        return Session(self.folder, identity, list(parts), minutes, write, clock=self.clock)

    def run(self, *parts, **options):
        session = self.session(*parts, **options)
        session.run([part.name for part in parts])
        return session

    def report(self):
        found = json.loads((self.folder / "report.json").read_text())
        return {
            case: entry["status"]
            for part in found["parts"].values()
            for case, entry in part["cases"].items()
        }

    @property
    def markdown(self):
        return (self.folder / "report.md").read_text()


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path / "results")


def raising(name, error, seconds=1.0):
    def measure(_):
        raise error

    return Case(name, seconds, measure)


def with_case(part, case, at=0):
    cases = [*part.cases]
    cases.insert(at, case)
    return part._replace(cases=cases)


def test_nothing_is_measured_twice(desk):
    part = desk.part("one", a=1, b=1)
    assert desk.run(part).failed == []
    desk.run(with_case(part, desk.part("other", c=1).cases[0]))
    assert desk.measured == ["a", "b", "c"]
    assert desk.report() == dict.fromkeys("cab", "measured")
    assert "| a | 42.0 |" in desk.markdown


def test_every_case_is_reported_before_the_next_begins(desk):
    seen = []
    look = Case("look", 1, lambda _: seen.append(desk.report()) or {})
    desk.run(with_case(desk.part("one", a=1, b=1), look, at=1), desk.part("two", c=1))
    assert seen == [{"a": "measured", "look": "begun", "b": "not run", "c": "not run"}]


def test_a_failure_is_kept_and_the_rest_goes_on(desk):
    part = with_case(desk.part("one", a=1), raising("bad", ZeroDivisionError("by\n zero")))
    assert desk.run(part).failed == ["one / bad"]
    assert desk.report() == {"bad": "failed", "a": "measured"}
    assert "- bad: failed, ZeroDivisionError: by zero\n" in desk.markdown
    text = (desk.folder / "report.json").read_text()
    assert "Traceback" in text
    # Once it is repaired it is measured.
    assert desk.run(desk.part("one", bad=1, a=1)).failed == []
    assert desk.measured == ["a", "bad"]


def test_what_is_not_here_is_skipped(desk):
    absent = raising("absent", Unavailable("no abacus: buy one"), seconds=0.0)
    session = desk.run(with_case(desk.part("one", a=1), absent), minutes=0.0)
    assert session.failed == []
    assert desk.report() == {"absent": "skipped", "a": "not run"}
    assert "- absent: skipped, no abacus: buy one\n" in desk.markdown
    desk.run(desk.part("one", absent=1))
    assert desk.measured == ["absent"]


def test_a_small_device_is_no_failure(desk):
    large = raising("large", RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte"))
    assert desk.run(with_case(desk.part("one", a=1), large)).failed == []
    assert desk.report() == {"large": "skipped", "a": "measured"}


def test_what_must_hold_and_does_not_is_a_failure(desk):
    wrong = Case("wrong", 1, lambda _: {"answer": 41, "violations": ["41 is not 42"]})
    part = with_case(desk.part("one"), wrong)
    assert desk.run(part).failed == ["one / wrong"]
    assert "**wrong does not hold**: 41 is not 42" in desk.markdown
    assert "| wrong | 41.0 |" in desk.markdown


def test_what_was_cut_goes_on(desk):
    cut = raising("a", Cut({"answer": 21}))
    desk.run(with_case(desk.part("one"), cut))
    assert "| a | 21.0 |" in desk.markdown
    desk.run(desk.part("one", a=1))
    assert "| a | 42.0 |" in desk.markdown


def test_a_part_takes_its_share_and_what_others_leave(desk):
    first = desk.part("one", a=20, b=20, c=20)
    second = desk.part("two", d=10)
    session = desk.run(first, second, minutes=1.0)
    # Thirty seconds hold a; then d; thirty are left, and hold b.
    assert desk.measured == ["a", "d", "b"]
    assert session.failed == []
    assert desk.report() == {"a": "measured", "b": "measured", "c": "not run", "d": "measured"}
    assert "- c: not run, 10 s left, about 20 needed" in desk.markdown


def test_guesses_are_corrected(desk):
    def slow(_):
        desk.clock.now += 10
        return {}

    part = with_case(desk.part("one", b=2), Case("slow", 1, slow))
    desk.run(part, minutes=0.5)
    assert "- b: not run, 20 s left, about 20 needed" not in desk.markdown
    assert desk.report()["b"] == "measured"
    desk.run(with_case(desk.part("two", d=2), Case("slow", 1, slow)), minutes=0.4)
    assert "- d: not run, 14 s left, about 20 needed" in desk.markdown


def test_what_was_killed_comes_last(desk):
    part = desk.part("one", a=1, b=1, c=1)
    desk.run(desk.part("one", a=1))
    with (desk.folder / "results.jsonl").open("a") as file:
        file.write('{"part": "one", "case": "b", "status": "begun"}\n{"part": "one", "ca')
    assert desk.run(part).failed == []
    assert desk.measured == ["a", "c", "b"]
    for line in (desk.folder / "results.jsonl").read_text().splitlines():
        json.loads(line)


HANGING = """
import sys, time
from pathlib import Path
from experiments.accelerator import report, session

session._GRACE_SECONDS = 0.5
cases = [session.Case("a", 0.1, lambda _: {}), session.Case("hangs", 0.1, lambda _: time.sleep(60))]
part = session.Part("one", "Part one", 1.0, cases, [])
write = report.writer("command")
session.Session(Path(sys.argv[1]), {"device": "abacus"}, [part], 0.02, write).run(["one"])
"""


def test_what_hangs_ends_with_the_minutes_and_takes_nothing_along(desk):
    command = [sys.executable, "-c", HANGING, str(desk.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "one / hangs did not end" in done.stdout
    assert desk.report() == {"a": "measured", "hangs": "begun"}


def test_results_of_other_devices_are_refused(desk):
    desk.run(desk.part("one", a=1))
    with pytest.raises(ValueError, match=r"abacus, 0, tiny, and this is quipu.*--output"):
        desk.session(identity=IDENTITY | {"device": "quipu"})


@pytest.mark.parametrize("scale", ["tiny", "full"])
def test_parts(scale, tmp_path):
    parts = make_parts(scale, tmp_path)
    assert tuple(part.name for part in parts) == PARTS
    for part in parts:
        names = [case.name for case in part.cases]
        assert len(set(names)) == len(names) > 0


def test_optimizers_have_the_settings_of_the_papers_ladder():
    from configs import ladder_paper

    config = ladder_paper.get_config()
    run, _ = training.settings("full")
    assert {key: run["model"][key] for key in ("head_dim", "mlp_ratio", "mlp", "positions")} == {
        key: config.train.model[key] for key in ("head_dim", "mlp_ratio", "mlp", "positions")
    }
    for key in ("context", "batch_size", "dtype", "clip_norm"):
        assert run[key] == config.train[key]
    assert run["model"]["width"] == config.widths[0]
    assert run["model"]["depth"] == config.depth
    for name, settings in config.optimizers.items():
        rate, options, _ = training._OPTIMIZERS[name]
        assert rate == settings.learning_rates[0]
        assert options.items() <= settings.options.to_dict().items()


# What is measured


@pytest.mark.parametrize("path", ["gpu", "tpu"])
def test_checks_hold_on_other_paths(path):
    with use_paths_of(path):
        findings = [
            *checks.check_products(16),
            *checks.check_orthogonalize("tuned", 16),
            *checks.check_eigenbasis(16),
            *checks.check_transformation(checks.subjects()["muon"], 8),
        ]
    assert [finding for finding in findings if not finding.passed] == []


def test_checks_find_what_is_wrong():
    subjects = checks.subjects()
    wrong = subjects["muon, svd"]._replace(reference=subjects["muon, newton_schulz"].reference)
    broken = [f.name for f in checks.check_transformation(wrong, 8) if not f.passed]
    assert broken == ["distance from float64"]


def test_a_step_of_an_optimizer():
    cases = {case.name: case for case in updates.part("tiny").cases}
    row = cases["optax adam"].measure(10.0)
    assert 0 < row["step_ms"] <= row["worst_ms"] * 10
    assert row["state_floats"] == pytest.approx(2, abs=1e-2)
    assert row["compile_seconds"] > 0
    assert row["program_lines"] > 10


def test_attention_that_fails_is_replaced(monkeypatch):
    """As cuDNN's does here, where there is no GPU."""
    tried = []

    def train(name, scale, microbatches, attention):
        tried.append(attention)
        if attention == "auto":
            raise RuntimeError("no cuDNN")
        return {"step_ms": 1.0}

    monkeypatch.setattr(training, "_train", train)
    (case, *_) = training.part("tiny").cases
    with pytest.raises(RuntimeError):
        case.measure(10.0)
    monkeypatch.setattr("mup_jax.training.config.attention_of", lambda *_: "cudnn")
    row = case.measure(10.0)
    assert row["note"] == "cudnn fails: no cuDNN"
    assert tried == ["auto", "auto", "xla"]


def test_a_ladder_needs_its_packages(desk, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    session = desk.run(ladder.part("tiny", desk.folder), minutes=0.0)
    assert session.failed == []
    assert "- ladder: skipped, missing grain: pip install '.[train]'" in desk.markdown


def run_command(output, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "experiments.accelerator", f"--output={output}", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        **options,
    )


def test_without_minutes_there_is_a_report_of_what_was_not_run(tmp_path):
    done = run_command(tmp_path, "--minutes=0.001")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert list(found["parts"]) == list(PARTS)
    statuses = {e["status"] for part in found["parts"].values() for e in part["cases"].values()}
    assert statuses <= {"not run", "skipped"}
    assert "- muon: not run, 0 s left" in (tmp_path / "report.md").read_text()
    other = run_command(tmp_path, "--minutes=0.001", "--scale=full")
    assert other.returncode == 2
    assert other.stderr.splitlines()[-1].startswith("error: ")
    assert "--output" in other.stderr


# All of it, tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run that is killed while it measures the second part, and begun again."""
    output = tmp_path_factory.mktemp("accelerator")
    parts = "--parts=properties,updates,training,compilation"
    command = [sys.executable, "-m", "experiments.accelerator", f"--output={output}", parts]
    results = output / "results.jsonl"
    process = subprocess.Popen(
        [*command, "--minutes=8"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None:
        if results.exists() and '"updates"' in results.read_text():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.1)
    process.wait()
    json.loads((output / "report.json").read_text())
    done = run_command(output, parts, "--minutes=8")
    return done, output


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_end(tiny):
    done, output = tiny
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((output / "report.json").read_text())
    for name in ("properties", "updates", "training", "compilation"):
        statuses = {key: e["status"] for key, e in found["parts"][name]["cases"].items()}
        assert {key for key, status in statuses.items() if status != "measured"} <= {
            key for key in statuses if "torch" in key
        }
    assert "measured" in {e["status"] for e in found["parts"]["training"]["cases"].values()}
    losses = [e["row"].get("loss") for e in found["parts"]["training"]["cases"].values()]
    assert sum(loss is not None for loss in losses) == 4


@pytest.mark.slow
def test_no_case_of_it_was_measured_twice(tiny):
    _, output = tiny
    lines = [json.loads(x) for x in (output / "results.jsonl").read_text().splitlines()[1:]]
    measured = [(x["part"], x["case"]) for x in lines if x["status"] == "measured"]
    assert len(set(measured)) == len(measured)


CONFIG_FILE = """
from configs import ladder_cpu
from experiments.ladder.plan import default_optimizer


def get_config():
    config = ladder_cpu.get_config()
    config.optimizers = {"adamw": {**default_optimizer(), "learning_rates": (8e-3, 1.6e-2)}}
    return config
"""


@pytest.mark.slow
def test_a_ladder_of_seconds(desk, tmp_path, monkeypatch):
    config = tmp_path / "ladder_of_one.py"
    config.write_text(CONFIG_FILE)
    monkeypatch.setitem(ladder.CONFIGS, "tiny", str(config))
    part = ladder.part("tiny", desk.folder)
    short = part._replace(cases=[case._replace(seconds=1.0) for case in part.cases])
    session = desk.run(short, minutes=0.5)
    assert session.failed == []
    assert desk.report() == {"ladder": "cut"}
    session = desk.run(short, minutes=6.0)
    assert session.failed == []
    assert desk.report() == {"ladder": "measured"}
    assert "8 16 24" in desk.markdown
    assert "adamw" in desk.markdown


@pytest.mark.parametrize(("widths", "tokens"), [size[1:] for size in ladder.SIZES])
def test_every_size_of_the_ladder_is_one(widths, tokens):
    config = ladder_gpu.get_config()
    config.update(widths=widths, tokens_per_parameter=tokens, seeds=(0,), parametrizations=("mup",))
    assert [rung.width for rung in Ladder(config).rungs] == [*widths]
