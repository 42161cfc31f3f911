import copy
import functools
import json
import re
from math import inf, nan

import pytest
from ml_collections import ConfigDict

from mup_jax.training import default_config, identity, validate
from mup_jax.training.config import (
    MACHINE_KEYS,
    check_optimizer,
    differences,
    epsilons_of,
    program_identity,
    steps_of,
    to_json,
)
from tests.training.tiny import tiny_config


def changed(**changes):
    return tiny_config(**changes)


def without(*path):
    config = default_config()
    node = config
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return config


def with_unknown(path, key):
    config = default_config()
    with config.unlocked():
        node = config[path] if path else config
        node[key] = 1
    return config


@pytest.mark.parametrize("name", ["adamw", "muon", "shampoo", "soap"])
def test_valid(name):
    validate(default_config())
    validate(changed(optimizer__name=name))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_unknown("", "tokenz"), r"unknown key config\.tokenz: did you mean 'tokens'\?"),
        (with_unknown("model", "widht"), r"config\.model\.widht: did you mean 'width'\?"),
        (with_unknown("base", "q"), r"unknown key config\.base\.q: known are depth, width"),
        (without("tokens"), r"missing key config\.tokens: the default is 102400"),
        (without("optimizer", "name"), r"missing key config\.optimizer\.name: .*'muon'"),
        (
            changed(optimizer__name="adam"),
            r"unknown optimizer 'adam': choose one of adamw, muon, shampoo, soap",
        ),
        (
            changed(optimizer__options=ConfigDict({"b3": 0.9})),
            r"adamw\.options\.b3: known are b1, b2, eps",
        ),
        (
            # The trainer sets it: it cannot be set a second time.
            changed(optimizer__options=ConfigDict({"learning_rate": 0.1})),
            r"adamw\.options\.learning_rate: did you mean .learning_rate_scaling.",
        ),
        (
            changed(optimizer__name="muon", optimizer__options=ConfigDict({"ns_steps": 0})),
            r"muon\.options: ns_steps=0",
        ),
        (changed(model__width=20), "width=20 is not a multiple of head_dim=8: choose width 16 or"),
        (changed(base__width=20), "width=20 is not a multiple of head_dim=8"),
        (changed(model__depth=0), "depth=0: choose a positive value"),
        (changed(tokens=127), r"config\.tokens=127 is less than one batch of 128 tokens"),
        (changed(warmup_tokens=40 * 128), r"warmup_tokens=5120: choose less than tokens=5120"),
        (changed(clip_norm=-1.0), r"config\.clip_norm=-1\.0: give a positive, finite value, or 0 "),
        (changed(context=0), r"config\.context=0: give a positive, finite value"),
        (changed(model__mlp="relu"), r"mlp='relu': choose one of swiglu, gelu"),
        (changed(model__positions="none"), r"config\.model\.positions='none': choose of"),
        (
            changed(optimizer__name="lion", optimizer__epsilon=1e-8),
            r"config\.optimizer\.epsilon: lion has none, leave it None",
        ),
        (changed(dtype="float16"), r"config\.dtype='float16': choose of"),
        (changed(remat="some"), r"remat='some': choose one of none, dots, full"),
        (changed(attention="flash"), r"attention='flash': choose one of"),
        (changed(seed=-1), r"config\.seed=-1: choose one in"),
    ],
)
def test_errors(config, message):
    with pytest.raises(ValueError, match=message):
        validate(config)


NUMBERS = {
    "seed": (-1, 2**31),
    "model__width": (0, -16),
    "model__depth": (0, -1),
    "model__head_dim": (0, -8),
    "model__mlp_ratio": (0, -1),
    "base__width": (0, -16),
    "base__depth": (0, -1),
    "context": (0, -1),
    "batch_size": (0, -1),
    "tokens": (0, -1),
    "warmup_tokens": (-1, 40 * 128),
    "optimizer__learning_rate": (nan, inf, 0.0, -1.0),
    "optimizer__embedding_readout_factor": (nan, inf, 0.0, -1.0),
    "optimizer__weight_decay": (nan, inf, -1.0),
    "optimizer__epsilon": (nan, inf, 0.0, -1.0, "small"),
    "clip_norm": (nan, inf, -1.0),
    "eval_batches": (0, -1),
    "eval_every": (-1,),
    "checkpoint_every": (-1,),
    "microbatches": (0, -1),
    "health_every": (-1,),
}


def test_every_number_is_checked():
    numbers = {
        key
        for key in leaves(default_config())
        if type(functools.reduce(getattr, key.split("__"), default_config())) in (int, float)
    }
    # The sizes of a mesh are checked where the devices are known.
    assert numbers - {*NUMBERS} == {"mesh__data", "mesh__fsdp", "mesh__tensor"}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in NUMBERS.items() for value in values]
)
def test_numbers_that_mean_nothing(key, value):
    with pytest.raises(ValueError, match=f"{key.rpartition('__')[2]}={re.escape(repr(value))}"):
        validate(changed(**{key: value}))


@pytest.mark.parametrize(
    ("name", "option", "value", "remedy"),
    [
        ("adamw", "b1", nan, r"choose one in \[0, 1\)"),
        ("adamw", "b2", 1.0, r"choose one in \[0, 1\)"),
        ("muon", "beta", -0.5, r"choose one in \[0, 1\)"),
        ("lamb", "eps", -1, "give a finite value, at least 0"),
        ("shampoo", "exponent", 0.0, "give a finite value above 0"),
        ("shampoo", "exponent", inf, "give a finite value above 0"),
        ("soap", "max_preconditioner_dim", 0, "raise the limit"),
        ("sophia", "update_interval", 0, "give a finite value above 0"),
        ("soap", "block_size", 1.5, r"give int \| None"),
        ("soap", "block_size", True, r"give int \| None"),
        ("soap", "eps", "1e-8", "give float"),
        ("shampoo", "grafted", "no", "give bool"),
        ("shampoo", "stagger", 1, "give bool"),
        ("muon", "variant", "q", "choose one of qiu, rms_matching"),
        (
            "lion",
            "weight_decay_scaling",
            None,
            "choose one of 1/width, constant, learning_rate",
        ),
    ],
)
def test_options_that_mean_nothing(name, option, value, remedy):
    message = rf"{name}\.options.*{option}={re.escape(repr(value))}: {remedy}"
    with pytest.raises(ValueError, match=message):
        check_optimizer(name, {option: value})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("soap", {"block_size": None, "eps": 1e-6, "stagger": False, "exact_steps": 2}),
        ("shampoo", {"exponent": 1, "adam_eps": 0.0, "weight_decay_scaling": "learning_rate"}),
        ("sophia", {"gamma": None, "seed": 3}),
    ],
)
def test_options(name, options):
    check_optimizer(name, options)


def test_a_misspelt_option_is_told_all_that_there_are():
    message = (
        r"unknown key lion\.options\.b_1: did you mean 'b1'\? known are b1, b2, "
        "learning_rate_scaling, weight_decay_scaling, scale_epsilon"
    )
    with pytest.raises(ValueError, match=message):
        check_optimizer("lion", {"b_1": 0.5})


CHANGES = {
    "seed": 1,
    "data__tokenizer": "other",
    "model__width": 24,
    "model__depth": 2,
    "model__head_dim": 4,
    "model__mlp_ratio": 2,
    "model__mlp": "gelu",
    "model__positions": "learned",
    "base__width": 24,
    "base__depth": 2,
    "context": 32,
    "batch_size": 16,
    "tokens": 6000,
    "warmup_tokens": 0,
    "optimizer__name": "muon",
    "optimizer__learning_rate": 2e-2,
    "optimizer__embedding_readout_factor": 2.0,
    "optimizer__weight_decay": 0.1,
    "optimizer__epsilon": 1e-6,
    "optimizer__options": ConfigDict({"b1": 0.8}),
    "clip_norm": 2.0,
    "eval_batches": 1,
    "eval_every": 0,
    "checkpoint_every": 5,
    "measure_optimizer": False,
    "dtype": "bfloat16",
    "init_from": "runs/other",
    "mesh__data": 4,
    "mesh__fsdp": 2,
    "mesh__tensor": 2,
    "microbatches": 2,
    "remat": "full",
    "attention": "xla",
    "health_every": 10,
}


def leaves(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ConfigDict) and key != "options":
            yield from leaves(value, f"{prefix}{key}__")
        else:
            yield prefix + key


def test_every_key_is_changed_below():
    assert {*leaves(default_config())} - {*CHANGES} == {"data__source"}


@pytest.mark.parametrize("key", CHANGES)
def test_identity_differs_for_any_change_but_of_the_machine(key):
    config = changed(**{key: CHANGES[key]})
    of_machine = key.partition("__")[0] in MACHINE_KEYS
    assert (identity(config) == identity(tiny_config())) == of_machine
    shares_programs = key in (
        "seed",
        "measure_optimizer",
        "optimizer__learning_rate",
        "optimizer__embedding_readout_factor",
        "optimizer__weight_decay",
    )
    assert (program_identity(config) == program_identity(tiny_config())) == shares_programs
    difference = differences(tiny_config().to_dict(), config.to_dict())
    assert len(difference) == 1
    assert difference[0].startswith(f"config.{key.replace('__', '.')}")


def test_runs_with_an_epsilon_share_programs():
    one, other = (changed(optimizer__epsilon=epsilon) for epsilon in (1e-6, 1e-3))
    assert identity(one) != identity(other)
    assert program_identity(one) == program_identity(other)


def test_absolute_epsilons():
    assert epsilons_of("adamw", {}) == ["eps"]
    assert epsilons_of("muon", {}) == ["eps", "adam_eps"]
    assert epsilons_of("shampoo", {}) == ["adam_eps"]
    assert epsilons_of("shampoo", {"relative_eps": False}) == ["eps", "adam_eps"]


def test_identity_is_stable():
    # Folders of finished cells are named by it: a change here makes them unreachable.
    text = json.dumps({"a": 1, "b": {"c": 0.5}})
    expected = "4dae33aeca8c"
    assert identity(ConfigDict({"b": {"c": 0.5}, "a": 1})) == expected
    assert identity(ConfigDict(json.loads(text))) == expected
    assert identity(tiny_config()) == identity(copy.deepcopy(tiny_config()))
    # A saved configuration is the same one.
    assert identity(ConfigDict(json.loads(to_json(tiny_config())))) == identity(tiny_config())


def test_program_identity_changes_nothing():
    config = changed(seed=3)
    program_identity(config)
    assert config.seed == 3
    assert config.optimizer.learning_rate == 1e-2


def test_differences_name_both_values():
    old, new = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3, "d": 4}}
    assert differences(old, new) == [
        "config.a.c was 2 and is now 3",
        "config.a.d was None and is now 4",
    ]
    assert differences(old, old) == []


def test_differences_of_texts_name_the_line():
    path = "config.optimizer.source"
    assert differences("a\nb\nc", "a\nx\nc", path) == [f"{path}, line 2, was 'b' and is now 'x'"]
    assert differences("a\nb", "a\nb\nc", path) == [f"{path}, line 3, was None and is now 'c'"]
    assert differences("a\n", "a\n\n\n", path)


@pytest.mark.parametrize(
    ("tokens", "batch_size", "context", "steps"),
    [
        # The smallest rung of arXiv 2512.05620, Table 3.
        (3_713_617_920, 128, 1024, 28_332),
        (128, 8, 16, 1),
        (255, 8, 16, 1),
        (256, 8, 16, 2),
    ],
)
def test_steps(tokens, batch_size, context, steps):
    config = changed(tokens=tokens, batch_size=batch_size, context=context)
    assert steps_of(config) == steps
