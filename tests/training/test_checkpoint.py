import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mup_jax.training import CheckpointError
from mup_jax.training.checkpoint import Checkpoints, set_damaged_aside
from tests.training.tiny import mesh_of, program_of, trained

FLIPS_PER_FILE = 5

# A failed read leaves coroutines behind that complain when they are collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]


def save(folder, steps, state, devices=1):
    with jax.set_mesh(mesh_of(devices)):
        checkpoints = Checkpoints(folder)
        for step in steps:
            moved = state._replace(step=jnp.full_like(state.step, step))
            checkpoints.save(step, moved, {"next_index": step})
        checkpoints.close()


def restore(folder, name="adamw", devices=1):
    with jax.set_mesh(mesh_of(devices)):
        checkpoints = Checkpoints(folder)
        try:
            return checkpoints.restore(abstract_state(name, devices))
        finally:
            checkpoints.close()


def abstract_state(name, devices):
    with jax.set_mesh(mesh_of(devices)):
        return program_of(devices, optimizer__name=name).abstract_state


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 10 and 20, to be copied."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, (10, 20), trained("adamw")[0])
    return folder


@pytest.fixture
def copied(saved, folder):
    shutil.copytree(saved, folder)
    return folder


@pytest.mark.parametrize("name", ["adamw", pytest.param("soap", marks=pytest.mark.slow)])
def test_bitwise(folder, name):
    state = trained(name)[0]
    # Damage must not be mistaken for what a diverged run looks like.
    state = state._replace(
        params=state.params | {"readout": state.params["readout"].at[0, :3].set(jnp.nan)}
    )
    save(folder, [20], state)
    restored, position = restore(folder, name)
    assert_same_bits(restored, state)
    assert position == {"next_index": 20}


def test_nothing_saved(folder):
    assert restore(folder) is None


def test_the_latest_two_are_kept(folder):
    save(folder, (1, 2, 3, 4), trained("adamw")[0])
    assert sorted(path.name for path in folder.iterdir()) == ["3", "4"]
    restored, position = restore(folder)
    assert restored.step == 4
    assert position == {"next_index": 4}


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8)])
def test_another_mesh(folder, before, after):
    state = trained("adamw")[0]
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state("adamw", before))
    save(folder, [20], jax.device_put(state, shardings), before)
    restored, _ = restore(folder, "adamw", after)
    assert_same_bits(restored, state)
    expected = abstract_state("adamw", after)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, expected
    )


def test_deleting_the_latest_goes_on_from_the_one_before(copied):
    shutil.rmtree(copied / "20")
    restored, position = restore(copied)
    assert restored.step == 10
    assert position == {"next_index": 10}


def test_a_killed_save_is_ignored(copied):
    # What Orbax leaves behind: a folder under a temporary name, at any stage.
    unfinished = copied / "30.orbax-checkpoint-tmp"
    shutil.copytree(copied / "20", unfinished)
    (unfinished / "state").rename(unfinished / "state.orbax-checkpoint-tmp")
    restored, _ = restore(copied)
    assert restored.step == 20
    assert not unfinished.exists()


def damage(path):
    """Every way in which a file was found to be damaged: shorter, flipped, gone."""
    contents = path.read_bytes()
    rng = np.random.default_rng(0)
    for length in {0, len(contents) // 2, len(contents) - 1}:
        path.write_bytes(contents[:length])
        yield
    for position in {0, len(contents) - 1, *rng.integers(len(contents), size=FLIPS_PER_FILE)}:
        flipped = bytearray(contents)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        yield
    path.unlink()
    yield
    path.write_bytes(contents)


def test_damage_is_found_and_the_checkpoint_before_is_used(saved, folder, caplog):
    names = [path.relative_to(saved / "20") for path in files_of(saved / "20")]
    names = [n for n in names if n.name != "digests.json" and (saved / "20" / n).stat().st_size]
    assert len(names) > 5
    for name in names:
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        for _ in damage(folder / "20" / name):
            caplog.clear()
            damaged = [path.read_bytes() for path in files_of(folder / "20")]
            set_damaged_aside(folder)
            assert [path.name for path in folder.iterdir()] == ["10"]
            (warning,) = caplog.messages
            assert f"the checkpoint of step 20 is damaged ({name.as_posix()}" in warning
            (aside,) = (folder.parent / "damaged").iterdir()
            assert str(aside) in warning
            assert [path.read_bytes() for path in files_of(aside)] == damaged
            aside.rename(folder / "20")
    assert restore(folder)[0].step == 20


def test_damaged_digests_are_damage(copied):
    digests = copied / "20" / "digests.json"
    digests.write_text(digests.read_text()[:-3])
    assert restore(copied)[0].step == 10


def test_a_checkpoint_without_digests_is_used(copied):
    # The run was killed in the moment after it was complete.
    (copied / "20" / "digests.json").unlink()
    assert restore(copied)[0].step == 20


def test_when_all_are_damaged_the_run_stops(copied):
    for step in ("10", "20"):
        (copied / step / "state" / "manifest.ocdbt").write_bytes(b"")
    before = files_of(copied)
    for _ in range(2):  # each time: a new beginning would overwrite what is left
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole \(20: state/mani"):
            restore(copied)
    assert files_of(copied) == before


def test_another_model(copied):
    with pytest.raises(CheckpointError, match=re.escape(str(copied / "20"))):
        restore(copied, "muon")
