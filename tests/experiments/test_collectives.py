"""What devices send each other, from the text of programs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from experiments.collectives import Traffic, count_collectives, traffic, without

PROGRAM = """
HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %ag-start = (f32[8]{0}, f32[64]{0}) all-gather-start(%x), dimensions={0}
  %ag-done = f32[64]{0} all-gather-done(%ag-start)
  %rs = f32[8]{0} reduce-scatter(%ag-done), dimensions={0}, to_apply=%add
  %a2a = (f32[4]{0}, f32[4]{0}) all-to-all(%x, %x)
  %a2a.2 = f32[8]{0} all-to-all(%x), dimensions={0}
  %cp = f32[8]{0} collective-permute-start(%x), source_target_pairs={{0,1}}
  %cp-done = f32[8]{0} collective-permute-done(%cp)
  %fusion = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="all-gather"}
  ROOT %tuple = f32[8]{0} while(%rs), body=%body
}
"""


def test_count_collectives():
    assert count_collectives(PROGRAM) == {
        "all-gather": 1,
        "all-reduce": 1,
        "all-to-all": 2,
        "collective-permute": 1,
        "reduce-scatter": 1,
    }
    assert count_collectives("ROOT %dot = f32[8,8]{1,0} dot(%x, %y)") == {}


def program_of(*lines):
    return "\n  ".join(["ENTRY %main (x: f32[8]) -> f32[8] {", *lines]) + "\n}"


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=mesh['a_0'=2,'a_1'=8], device_ids=([2,8]T(1,0)) {'a_0'}, dims={0}", 2),
        ("replica_groups=mesh['a_0'=4,'a_1'=4] {'a_0', 'a_1'}, a=true", 16),
    ],
)
def test_groups_as_compilers_write_them(groups, size):
    program = program_of(f"%r = f32[8]{{0}} all-reduce(%x), {groups}")
    one = traffic(program, per_host=16)["all-reduce"]
    assert one == Traffic(1, 2 * 32 * (size - 1) / size, 0.0)


ASYNCHRONOUS = {
    # 3/4 of the result comes from others.
    "all-gather": ("(bf16[4,8]{1,0}, bf16[16,8]{1,0})", 16 * 8 * 2 * 3 / 4),
    "all-reduce": ("bf16[16,8]{1,0}", 16 * 8 * 2 * 2 * 3 / 4),
    # A sum for each of three others.
    "reduce-scatter": ("((f32[16,8]{1,0}), f32[4,8]{1,0})", 4 * 8 * 4 * 3),
    "all-to-all": ("((f32[16,8]{1,0}), f32[16,8]{1,0})", 16 * 8 * 4 * 3 / 4),
    "collective-permute": ("(f32[16,8]{1,0}, f32[16,8]{1,0})", 16 * 8 * 4),
}


@pytest.mark.parametrize("kind", ASYNCHRONOUS)
def test_what_only_begins_here(kind):
    """Its shape has the operands too."""
    shape, sent = ASYNCHRONOUS[kind]
    groups = "replica_groups={{0,1,2,3},{4,5,6,7}}"
    begin = f"%begun = {shape} {kind}-start(%x), {groups}, dimensions={{0}}"
    program = program_of(begin, f"%done = f32[4,8]{{1,0}} {kind}-done(%begun)")
    assert traffic(program, per_host=8) == {kind: Traffic(1, sent, 0.0)}


def test_a_loop_sends_at_every_turn():
    mesh = jax.make_mesh((4,), ("data",))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    def five_times(x):
        def turn(x, _):
            everything = jax.lax.all_gather(x, "data", tiled=True)
            return x + jnp.sin(everything).reshape(4, -1, 3).sum(0), None

        return jax.lax.scan(turn, x, length=5)[0]

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 3)), jax.NamedSharding(mesh, jax.P("data")))
        text = jax.jit(five_times).lower(x).compile().as_text()
    assert traffic(text, per_host=4) == {"all-gather": Traffic(5, 5 * 8 * 3 * 4 * 3 / 4, 0.0)}


@pytest.mark.parametrize(
    ("kind", "groups", "beyond"),
    [
        # Two hosts of four: of 4 x 8 floats, half come from the other host, by four devices.
        ("all-gather", "{{0,1,2,3,4,5,6,7}}", 128 / 2 / 4),
        ("all-reduce", "{{0,1,2,3,4,5,6,7}}", 2 * 128 / 2 / 4),
        ("all-reduce", "{{0,4},{1,5},{2,6},{3,7}}", 2 * 128 / 2),
        ("reduce-scatter", "{{0,4},{1,5},{2,6},{3,7}}", 2 * 128 / 2),
        ("all-to-all", "{{0,1,2,3,4,5,6,7}}", 128 / 2),
        ("all-to-all", "[4,2]<=[2,4]T(1,0)", 128 / 2),
        ("all-to-all", "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", 128 / 2),
        ("all-to-all", "mesh['a'=2,'b'=4] {'b'}", 0.0),
        ("all-reduce", "{{0,1,2,3},{4,5,6,7}}", 0.0),
    ],
)
def test_what_leaves_a_host(kind, groups, beyond):
    program = program_of(f"%r = f32[4,8]{{1,0}} {kind}(%x), replica_groups={groups}, a={{0}}")
    assert traffic(program, per_host=4)[kind].beyond == beyond


def test_a_scope_is_that_of_the_operation():
    of = "f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, metadata={op_name"
    program = program_of(f'%r = {of}="jit(f)/mine/add"}}', f'%s = {of}="jit(f)/add"}}')
    whole, part = (traffic(program, 2, scope)["all-reduce"] for scope in ("", "mine"))
    assert (whole.calls, part.calls) == (2, 1)
    assert without(whole, part) == Traffic(1, 32.0, 0.0)
    assert without(whole, None) == whole
