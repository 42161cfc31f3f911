"""The configuration of one training run: defaults, validation and identity."""

import copy
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import jax
import optax

from mup_jax.models.attention import attention_of
from mup_jax.models.llama import LlamaConfig
from mup_jax.optimizers import find_optimizer
from mup_jax.optimizers.assembly import EPSILONS, Transfer
from mup_jax.optimizers.from_file import FileOptimizer, is_file, read_file
from mup_jax.transfer import ParamShape
from mup_jax.transfer.mup import IndependentScaling

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# A ConfigDict, or anything with the same attributes: a step needs no ml_collections.
Config = Any

POSITIONS = ("rotary", "learned")
DTYPES = ("float32", "bfloat16")
MACHINE_KEYS = ("mesh", "microbatches", "remat", "attention", "health_every")
# The arguments of an optimizer that the trainer sets itself.
_SET_BY_TRAINER = {
    "learning_rate",
    "embedding_readout_learning_rate",
    "weight_decay",
    "independent_weight_decay",
    "schedule",
    "shapes",
    "weight_dimension_numbers",
}
# Options that say how hyperparameters depend on the size of the model, and their types: those of
# `Transfer`, and whether the learning rate multiplies the decay.
_DECAY_SCALING = "weight_decay_scaling"
TRANSFER_OPTIONS = {k: kind for k, kind in get_type_hints(Transfer).items() if k != "shapes"}
TRANSFER_OPTIONS[_DECAY_SCALING] = Literal[*get_args(IndependentScaling), "learning_rate"]


def default_settings() -> dict[str, Any]:
    """A run of a few seconds; every key that a run has.

    `base` is the model in which learning rate and weight decay were tuned. `tokens` and
    `warmup_tokens` count training tokens; steps follow from `batch_size` (rows) and `context`.
    Embedding, readout and vectors have `optimizer.embedding_readout_factor` times the learning rate
    of hidden matrices. `optimizer.weight_decay` is the independent λ; with the option
    `weight_decay_scaling="learning_rate"` it is multiplied by the learning rate, as that of
    `optax.adamw`. `optimizer.options` are passed on to `mup_jax.<optimizer.name>` and its
    `mup_jax.Transfer`;
    `optimizer.epsilon`, where it is not None, is every absolute ε of it. A name like
    my_optimizer.py:make is that of a function in a file (see `mup_jax.optimizers.from_file`), whose
    text `with_source` adds as `optimizer.source`. `clip_norm` bounds the
    global norm of the gradient; 0 leaves it alone. `eval_batches` bounds the validation batches;
    validation also runs every `eval_every` steps where that is not 0. Without checkpoints
    (`checkpoint_every` 0) an interrupted run begins again. `measure_optimizer` is whether the
    optimizer's FLOPs and share of a step are measured. `dtype` is that of activations; weights are
    float32. `init_from` is the folder of a run of the same model whose weights this one begins
    with; empty for random ones.

    `MACHINE_KEYS` say how the work is done, not what comes out, and may change when a run goes on:
    `mesh` is how devices are arranged (see `make_mesh`), `microbatches` into how many parts a batch
    is cut, whose gradients are added up, `remat` which activations are computed again (see
    `LlamaConfig`) and `attention` the kernel, "auto" for the fastest that the platform has. The
    health of preconditioners is measured every `health_every` steps, never where that is 0.
    """
    return {
        "seed": 0,
        "data": {"source": "stdlib", "tokenizer": "char"},
        "model": {
            "width": 32,
            "depth": 2,
            "head_dim": 8,
            "mlp_ratio": 4,
            "mlp": "swiglu",
            "positions": "rotary",
        },
        "base": {"width": 32, "depth": 2},
        "context": 128,
        "batch_size": 4,
        "tokens": 200 * 512,
        "warmup_tokens": 20 * 512,
        "optimizer": {
            "name": "muon",
            "learning_rate": 2e-2,
            "embedding_readout_factor": 1.0,
            "weight_decay": 0.0,
            "epsilon": None,
            "options": {},
        },
        "clip_norm": 1.0,
        "eval_batches": 32,
        "eval_every": 0,
        "checkpoint_every": 100,
        "measure_optimizer": True,
        "dtype": "float32",
        "init_from": "",
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        "microbatches": 1,
        "remat": "none",
        "attention": "auto",
        "health_every": 0,
    }


def default_config() -> "ConfigDict":
    """`default_settings` as a ConfigDict; needs ml_collections."""
    from ml_collections import ConfigDict

    return ConfigDict(default_settings())


def as_namespace(settings: Mapping[str, Any]) -> SimpleNamespace:
    """Settings as attributes, for `Program` where ml_collections is missing.

    settings = default_settings() | {"context": 1024}
    program = Program(as_namespace(settings), vocab_size)
    """
    nested = lambda key, value: as_namespace(value) if _has_attributes(key, value) else value
    return SimpleNamespace(**{key: nested(key, value) for key, value in settings.items()})


def _has_attributes(key: str, value: Any) -> bool:
    return isinstance(value, dict) and key != "options"  # those of an optimizer have any names


def steps_of(config: Config) -> int:
    """Number of optimizer steps; an incomplete last batch is not trained on."""
    return config.tokens // (config.batch_size * config.context)


def model_config(
    config: Config, vocab_size: int, *, base: bool = False, platform: str | None = None
) -> LlamaConfig:
    """The Llama to train, or the base model of its scaling rules; on JAX's platform by default."""
    size = config.base if base else config.model
    attention = config.attention
    if attention == "auto":
        attention = attention_of(
            platform or jax.default_backend(), config.dtype, config.context, config.model.head_dim
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        width=size.width,
        depth=size.depth,
        head_dim=config.model.head_dim,
        mlp_ratio=config.model.mlp_ratio,
        mlp=config.model.mlp,
        learned_positions=config.context if config.model.positions == "learned" else 0,
        base_depth=config.base.depth,
        dtype=config.dtype,
        attention=attention,
        remat=config.remat,
    )


def optimizer_of(config: Config) -> Callable[..., Any]:
    """What makes the optimizer of a run; see `mup_jax.optimizers.find_optimizer`."""
    return find_optimizer(config.optimizer.name, getattr(config.optimizer, "source", ""))


def make_optimizer(
    make: Callable[..., Any],
    learning_rate: Any,
    *,
    shapes: Any,
    weight_decay: Any,
    options: Mapping[str, Any],
    **arguments: Any,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer with a run's options and weight decay, which `default_settings` explains."""
    own = {key: value for key, value in options.items() if key not in TRANSFER_OPTIONS}
    scalings = {key: value for key, value in options.items() if key in TRANSFER_OPTIONS}
    decay = "independent_weight_decay"
    if scalings.get(_DECAY_SCALING) == "learning_rate":
        decay = "weight_decay"
        del scalings[_DECAY_SCALING]
    given = {decay: weight_decay, "shapes": Transfer(shapes, **scalings), **own, **arguments}
    return make(learning_rate, **given)


def with_source(config: "ConfigDict") -> "ConfigDict":
    """A configuration with the text of the file that its optimizer is from, where it is from one.

    So a changed file is another configuration, and a run needs the file no more, wherever it is.

    Raises:
      ValueError: there is no such file.
    """
    given = config.get("optimizer", {})
    if not is_file(given.get("name", "")) or "source" in given:
        return config
    name, source = read_file(given.name)
    pinned = copy.deepcopy(config)
    with pinned.unlocked():
        pinned.optimizer.update(name=name, source=source)
    return pinned


def describe_rule(config: Config) -> str | None:
    """A line on the rule of an optimizer from a file; None of one of ours, whose rule is known."""
    make = optimizer_of(config)
    return make.describe_rule(config.optimizer.options) if isinstance(make, FileOptimizer) else None


def epsilons_of(name: str, options: Mapping[str, Any], source: str = "") -> list[str]:
    """The arguments of an optimizer that are an absolute ε: by default not Shampoo's own."""
    parameters = inspect.signature(find_optimizer(name, source)).parameters
    is_relative = "relative_eps" in parameters and options.get("relative_eps", True)
    absolute = {*EPSILONS} - ({"eps"} if is_relative else set())
    return [parameter for parameter in parameters if parameter in absolute]


def check_known(keys: Iterable[str], known: Iterable[str], path: str) -> None:
    """Raises ValueError, with a suggestion, where a key is not a known one."""
    known = list(known)
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"unknown key {path}.{key}: {hint}known are {', '.join(known)}")


def check_keys(config: Any, reference: Any, path: str = "config") -> None:
    """Raises ValueError where `config` has a key that `reference` lacks, or lacks one."""
    check_known(config, reference, path)
    for key, value in reference.items():
        if key not in config:
            raise ValueError(f"missing key {path}.{key}: the default is {value!r}")
        if hasattr(value, "items") and len(value):  # an empty one may have any keys
            check_keys(config[key], value, f"{path}.{key}")


def check_number(path: str, value: Any, *, allow_zero: bool = False) -> None:
    """Raises ValueError where a value is not a number, not finite, or not above 0."""
    is_finite = isinstance(value, (int, float)) and math.isfinite(value)
    if not is_finite or value < 0 or (value == 0 and not allow_zero):
        or_zero = ", or 0 for none" if allow_zero else ""
        raise ValueError(f"{path}={value!r}: give a positive, finite value{or_zero}")


def check_optimizer(name: str, options: Any, source: str = "") -> None:
    """Raises ValueError for an optimizer, or an option of it, that does not exist or is refused.

    Args:
      name: of `find_optimizer`.
      options: of it.
      source: the text of its file, where it is from one.
    """
    make = find_optimizer(name, source)
    types = get_type_hints(make) | TRANSFER_OPTIONS
    parameters = inspect.signature(make).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known = [key for key in parameters if key not in _SET_BY_TRAINER] + [*TRANSFER_OPTIONS]
        check_known(options, known, f"{name}.options")
    for key, value in options.items():
        _check_type(f"{name}.options.{key}", value, types.get(key, Any))
    _check_options(name, json.dumps(dict(options)), source)


def _check_type(path: str, value: Any, kind: Any) -> None:
    if not _is_of(value, kind):
        if get_origin(kind) is Literal:
            raise ValueError(f"{path}={value!r}: choose one of {', '.join(get_args(kind))}")
        raise ValueError(f"{path}={value!r}: give {inspect.formatannotation(kind)}")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type: a class, a Literal or a union."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, member) for member in get_args(kind))
    if kind not in (bool, int, float, str, NoneType):
        return True  # a function in a file may ask for anything
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


@functools.cache  # a sweep asks again and again
def _check_options(name: str, options: str, source: str) -> None:
    matrix = {"w": jax.ShapeDtypeStruct((2, 2), "float32")}
    shapes = {"w": ParamShape("hidden", 2, 2, 2, 2)}
    try:
        make = find_optimizer(name, source)
        optimizer = make_optimizer(
            make, 1.0, shapes=shapes, weight_decay=0.0, options=json.loads(options)
        )
        functions = {"obj_fn": lambda tree: tree["w"].sum(), "logits_fn": lambda tree: tree["w"]}
        jax.eval_shape(lambda w: optimizer.update(w, optimizer.init(w), w, **functions), matrix)
    except (TypeError, ValueError) as error:
        path = "" if str(error).startswith(name) else f"{name}.options: "
        raise ValueError(f"{path}{error}") from error


def validate(config: Config) -> None:
    """Checks what can be checked before anything is loaded or compiled.

    Raises:
      ValueError: naming the key, its value and the remedy.
    """
    config, reference = with_source(config), default_config()
    source = config.get("optimizer", {}).get("source", "")
    if source:
        reference.optimizer.source = source
    check_keys(config, reference)
    given = config.optimizer
    check_optimizer(given.name, given.options, source)
    if given.epsilon is not None and not epsilons_of(given.name, given.options, source):
        raise ValueError(f"config.optimizer.epsilon: {given.name} has none, leave it None")
    if config.model.positions not in POSITIONS:
        raise ValueError(
            f"config.model.positions={config.model.positions!r}: choose of {POSITIONS}"
        )
    if config.dtype not in DTYPES:
        raise ValueError(f"config.dtype={config.dtype!r}: choose of {DTYPES}")
    for base in (False, True):
        model_config(config, vocab_size=1, base=base)
    for key in ("context", "batch_size", "eval_batches", "microbatches"):
        check_number(f"config.{key}", config[key])
    for key in ("clip_norm", "checkpoint_every", "eval_every", "health_every"):
        check_number(f"config.{key}", config[key], allow_zero=True)
    for key in ("learning_rate", "embedding_readout_factor"):
        check_number(f"config.optimizer.{key}", given[key])
    check_number("config.optimizer.weight_decay", given.weight_decay, allow_zero=True)
    if given.epsilon is not None:
        check_number("config.optimizer.epsilon", given.epsilon)
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"config.seed={config.seed}: choose one in [0, 2**31)")
    tokens_per_step = config.batch_size * config.context
    if steps_of(config) < 1:
        raise ValueError(
            f"config.tokens={config.tokens} is less than one batch of {tokens_per_step} tokens"
        )
    if not 0 <= config.warmup_tokens < config.tokens:
        raise ValueError(
            f"config.warmup_tokens={config.warmup_tokens}: choose less than tokens={config.tokens}"
        )


def to_json(config: Config) -> str:
    """The configuration as JSON with sorted keys: equal configurations give equal text."""
    return json.dumps(config.to_dict(), sort_keys=True)


def without_machine(config: Config) -> Config:
    """A copy in which all `MACHINE_KEYS` have their defaults."""
    same, defaults = copy.deepcopy(config), default_config()
    for key in MACHINE_KEYS:
        if key in same:
            same[key] = defaults[key]
    return same


def identity(config: Config) -> str:
    """A name for the run with this configuration, on any machine: 12 hexadecimal digits."""
    same = without_machine(with_source(config))
    return hashlib.sha256(to_json(same).encode()).hexdigest()[:12]


def program_identity(config: Config) -> str:
    """Equal for runs that can share compiled programs: learning rates, weight decay, ε and seed are
    arguments of those, and what is measured afterwards is no part of them.
    """
    shared = config.to_dict()
    shared |= {"seed": 0, "measure_optimizer": True}
    shared["optimizer"] |= {
        "learning_rate": 0.0,
        "embedding_readout_factor": 1.0,
        "weight_decay": 0.0,
        "epsilon": None if config.optimizer.epsilon is None else 0.0,
    }
    return json.dumps(shared, sort_keys=True)


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """The keys in which two configurations (dicts) differ, with both values."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{path}{_difference(old, new)}"]
    keys = sorted({*old, *new})
    return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}")]


def _difference(old: Any, new: Any) -> str:
    """Both values, or of texts the first line that differs."""
    if isinstance(old, str) and isinstance(new, str) and "\n" in old:
        lines = itertools.zip_longest(old.splitlines(), new.splitlines())
        for number, (before, now) in enumerate(lines, 1):
            if before != now:
                return f", line {number}, was {before!r} and is now {now!r}"
    return f" was {old!r} and is now {new!r}"
