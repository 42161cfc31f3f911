"""The time that is left, told early enough to be of use."""

import heapq
import math

import pytest

from configs import ladder_cpu
from experiments.cells.pace import Pace
from experiments.ladder.plan import Ladder, Series
from experiments.ladder.schedule import missing_tasks, work_of


def durations(exponent, preparation):
    """Seconds to prepare a task, and of a cell: optimizers differ, and so do sizes."""
    slowness = {"adamw": 1.0, "muon": 1.2, "shampoo": 1.5, "soap": 1.7}

    def of(ladder, task):
        factor = slowness[task.name.split(",")[0]]
        flops = {rung.name: rung.flops for rung in ladder.rungs}
        relative = flops[task.size] / ladder.rungs[0].flops
        return preparation * factor, factor * relative**exponent

    return of


def distance_from_middle(ladder, cell):
    """A loss whose minimum is inside the grid of the optimizer."""
    given, grid = cell.config.optimizer, ladder.grid(Series(cell.config.optimizer.name))
    rate, factor = (axis[1] for axis in grid)
    return (
        math.log2(given.learning_rate / rate) ** 2
        + math.log2(given.embedding_readout_factor / factor) ** 2
    )


def simulate(ladder, of):
    """Runs a ladder on its workers without training: `(time, estimate of what is left)`."""
    work = work_of(ladder)
    pace = Pace(work.flops, work.workers)
    results, events, estimates, running = {}, [], [], set()
    now = 0.0

    def submit():
        for task in missing_tasks(ladder, results):
            key = (task.size, task.name)
            if len(running) < work.workers and key not in running:
                running.add(key)
                preparation, seconds = of(ladder, task)
                start = now + preparation
                heapq.heappush(events, (now, id(task), key, task.cells[0], 0.0, False))
                for i, cell in enumerate(task.cells):
                    for quarter in (1, 2, 3, 4):
                        last = quarter == 4 and i == len(task.cells) - 1
                        at = start + (i + quarter / 4) * seconds
                        heapq.heappush(events, (at, id(cell), key, cell, quarter / 4, last))

    submit()
    while events:
        now, _, key, cell, part, last = heapq.heappop(events)
        pace.add(key, cell.name, part, now)
        if part == 1:
            results[cell.name] = {"validation_loss": distance_from_middle(ladder, cell)}
        if last:
            running.discard(key)
            submit()
        estimates.append((now, pace.seconds_left(work.remaining_cells(results))))
    return now, estimates


@pytest.mark.parametrize(
    ("exponent", "preparation"), [(0.75, 4.0), (0.8, 8.0), (0.85, 4.0), (0.9, 1.0)]
)
def test_right_within_a_third_from_the_tenth_part_on(exponent, preparation):
    """Whatever sizes cost beyond what is known of smaller ones, and however long compilation is."""
    config = ladder_cpu.get_config()
    config.workers = 2
    total, estimates = simulate(Ladder(config), durations(exponent, preparation))
    middle = [(now, left) for now, left in estimates if 0.1 * total <= now <= 0.9 * total]
    assert len(middle) > 20
    for now, left in middle:
        assert left is not None
        assert (total - now) * 2 / 3 <= left <= (total - now) * 4 / 3, (now, left, total)


def test_nothing_is_said_before_anything_was_trained():
    pace = Pace({"small": 1.0}, workers=1)
    pace.add(("small", "adamw"), "cell", 0.0, 10.0)
    assert pace.seconds_left({("small", "adamw"): 3}) is None
    pace.add(("small", "adamw"), "cell", 0.5, 14.0)
    pace.add(("small", "adamw"), "cell", 1.0, 16.0)
    # Half a cell took two seconds; the other task will prepare for four before, a third longer each
    # as it is unknown.
    assert pace.seconds_left({("small", "adamw"): 2}) == pytest.approx(2 * 4.0)
    both = {("small", "adamw"): 2, ("small", "muon"): 1}
    assert pace.seconds_left(both) == pytest.approx(2 * 4.0 + 1.3 * (4.0 + 4.0))
