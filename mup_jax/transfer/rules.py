"""The scaling rules as data.

A rule says how learning rate and ε of one optimizer change from a base model to a larger one, so
that every layer's output changes by Θ(1) per step at any width and depth. All quantities in it are
ratios to the base model: at the base shapes every factor is 1. docs/rules.md is made of these
objects.

[Q] is Qiu et al., arXiv 2512.05620; [G] is Gupta et al., arXiv 2602.20937; [Y] is Yang et al.,
arXiv 2310.17813. Where a rule of [G] is not the default, it is the `variant` "gupta".
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mup_jax.transfer.shapes import ParamShape
from mup_jax.transforms.blocking import Blocking, Sides


@dataclass(frozen=True)
class PowerLaw:
    """d_in^a · d_out^b · L^c · n_blk^d · b^e, with every quantity as a ratio to the base.

    Attributes:
      d_in: exponent of the fan-in.
      d_out: exponent of the fan-out.
      depth: exponent of the number of layers L (1 outside the residual blocks), or rather of the
        L^α that residual branches are divided by; α is 1 unless `infer_shapes` is told otherwise.
      blocks: exponent of the number of blocks of the matrix.
      block: exponent of the block length along one side; only in the law of a side.

    Example:
      >>> mup_jax.PowerLaw(d_in=-1)  # η ∝ 1/fan-in
      PowerLaw(d_in=-1, d_out=0.0, depth=0.0, blocks=0.0, block=0.0)
    """

    d_in: float = 0.0
    d_out: float = 0.0
    depth: float = 0.0
    blocks: float = 0.0
    block: float = 0.0


NO_BLOCKS = Blocking(block_size=None, max_preconditioner_dim=0)


@dataclass(frozen=True)
class Rule:
    """How one optimizer's learning rate and ε scale.

    Both are a power law, times the law of a side for each side that has a preconditioner. Gradients
    within residual blocks are ∝ L^(-α), so the exponent of depth is h in the law of η, and minus
    its degree in that of ε. And of a change of Θ(1) in the residual stream a layer's share is
    L^(α-1) of its own output: η has this factor besides, which is 1 for α = 1.

    Attributes:
      name: of the optimizer.
      learning_rate_law: of η.
      epsilon_law: of an absolute ε.
      readout_learning_rate_law: of η at readouts; None where they are as the others.
      homogeneity: h, where the optimizer without ε maps c·G to c^h times its update of G; of a
        matrix with both sides preconditioned.
      learning_rate_per_side: factor of η for each preconditioned side.
      epsilon_per_side: likewise of ε.
      homogeneity_per_side: what one preconditioned side contributes to h.
      epsilon_degree: the power of the gradient that ε is compared with; 0 where ε needs no rule, or
        is not compared with the gradient.
      blocking: which sides have a preconditioner, in which blocks.
      source: of the rule.

    Example:
      >>> rule = mup_jax.Rule("mine", mup_jax.PowerLaw(d_in=-0.5), epsilon_degree=0)
      >>> rule.learning_rate(mup_jax.ParamShape("hidden", 256, 256, 64, 64))
      0.5
    """

    name: str
    learning_rate_law: PowerLaw
    epsilon_law: PowerLaw = PowerLaw()
    readout_learning_rate_law: PowerLaw | None = None
    homogeneity: float = 0.0
    learning_rate_per_side: PowerLaw = PowerLaw()
    epsilon_per_side: PowerLaw = PowerLaw()
    homogeneity_per_side: float = 0.0
    epsilon_degree: int = 1
    blocking: Blocking = NO_BLOCKS
    source: str = "[Q], [G]"

    def learning_rate(self, shape: ParamShape) -> float:
        """The factor of η for a parameter.

        Raises:
          ValueError: a side is preconditioned in the base or in the target only; from `epsilon` and
            the scales too.
        """
        law = self.learning_rate_law
        if shape.role == "readout" and self.readout_learning_rate_law is not None:
            law = self.readout_learning_rate_law
        share_of_layer = shape.depth_ratio ** (shape.residual_exponent - 1)
        return share_of_layer * self._factor(law, self.learning_rate_per_side, shape)

    def epsilon(self, shape: ParamShape) -> float:
        """The factor of an absolute ε for a parameter."""
        return self._factor(self.epsilon_law, self.epsilon_per_side, shape)

    def gradient_scale(self, shape: ParamShape) -> float:
        """c such that running the optimizer on c·G with the base ε is the same as scaling ε."""
        return self.epsilon(shape) ** (-1 / self.epsilon_degree) if self.epsilon_degree else 1.0

    def update_scale(self, shape: ParamShape) -> float:
        """The factor of the update of c·G: η's factor, with c^h taken out again."""
        degree = self.degree(shape.d_in, shape.d_out)
        return self.learning_rate(shape) * self.gradient_scale(shape) ** -degree

    def degree(self, d_in: int, d_out: int) -> float:
        """h of a matrix, of which a side may have no preconditioner."""
        missing_sides = 2 - sum(self.blocking.preconditioned_sides(d_in, d_out))
        return self.homogeneity - missing_sides * self.homogeneity_per_side

    def with_learning_rate(self, law: PowerLaw) -> "Rule":
        """The rule with another law of η for every role, sides included."""
        return replace(
            self,
            learning_rate_law=law,
            readout_learning_rate_law=None,
            learning_rate_per_side=PowerLaw(),
        )

    def with_constant_epsilon(self) -> "Rule":
        """The rule with ε the same at every size."""
        return replace(self, epsilon_law=PowerLaw(), epsilon_per_side=PowerLaw())

    def _factor(self, law: PowerLaw, per_side: PowerLaw, shape: ParamShape) -> float:
        here = (shape.d_in, shape.d_out)
        base = (shape.base_d_in, shape.base_d_out)
        on_sides = self.blocking.preconditioned_sides(*here)
        if self.blocking.preconditioned_sides(*base) != on_sides:
            raise ValueError(
                f"max_preconditioner_dim={self.blocking.max_preconditioner_dim} is between a side "
                f"of {base} in the base and of {here} here: preconditioned in one of them only, "
                "they have no rule in common; raise or lower it"
            )
        blocks, base_blocks = self.blocking.count(*here), self.blocking.count(*base)

        def evaluate(law: PowerLaw, block_ratio: float = 1.0) -> float:
            return (
                (here[0] / base[0]) ** law.d_in
                * (here[1] / base[1]) ** law.d_out
                * shape.branch_divisor**law.depth
                * (blocks / base_blocks) ** law.blocks
                * block_ratio**law.block
            )

        factor = evaluate(law)
        for d, base_d, on in zip(here, base, on_sides, strict=True):
            if on:
                ratio = self.blocking.block_length(d) / self.blocking.block_length(base_d)
                factor *= evaluate(per_side, ratio)
        return factor


MeasuredOrGupta = Literal["measured", "gupta"]
MeasuredOrPublished = Literal["published", "measured"]
QiuOrGupta = Literal["qiu", "gupta"]
QiuOrRmsMatching = Literal["qiu", "rms_matching"]


def _check_variant(variant: str, known: object) -> None:
    if variant not in get_args(known):
        raise ValueError(f"variant={variant!r}: choose {' or '.join(map(repr, get_args(known)))}")


def sgd() -> Rule:
    """SGD, with or without momentum: η ∝ L·d_out/d_in."""
    law = PowerLaw(d_in=-1, d_out=1, depth=1)
    return Rule("sgd", law, homogeneity=1.0, epsilon_degree=0, source="[G], [Y]")


def adam() -> Rule:
    """Adam, AdamW: η ∝ 1/d_in, ε ∝ 1/(L·d_out)."""
    return Rule("adam", PowerLaw(d_in=-1), PowerLaw(d_out=-1, depth=-1))


def adopt() -> Rule:
    """ADOPT: as Adam."""
    return replace(adam(), name="adopt")


def lion() -> Rule:
    """Lion: as Adam; it has no ε."""
    return Rule("lion", PowerLaw(d_in=-1), epsilon_degree=0)


def sophia(*, variant: MeasuredOrGupta = "measured") -> Rule:
    """Sophia: as Adam where updates are clipped.

    The fraction that is clipped stays what it is if γ ∝ L·d_out; see `mup_jax.sophia`.

    Args:
      variant: "measured", or "gupta" with ε ∝ 1/d_out at any depth.
    """
    _check_variant(variant, MeasuredOrGupta)
    if variant == "gupta":
        return Rule("sophia", PowerLaw(d_in=-1), PowerLaw(d_out=-1), source="[G]")
    return replace(adam(), name="sophia", source="[G], measured")


def lamb(*, variant: MeasuredOrGupta = "measured") -> Rule:
    """LAMB: η ∝ 1/√d_in, but constant at readouts; ε as Adam.

    Adam's update wants 1/d_in, of which the trust ratio ‖W‖_F/‖r‖_F has 1/√d_in in hidden matrices,
    and all of it in readouts whose entries are ∝ 1/d_in or begin at zero.

    Args:
      variant: "measured", or "gupta" with η constant: [G] takes ‖W‖_F to be ∝ ‖W‖₂, which it is
        not in random matrices.
    """
    _check_variant(variant, MeasuredOrGupta)
    if variant == "gupta":
        return Rule("lamb", PowerLaw(), adam().epsilon_law, source="[G]")
    return Rule(
        "lamb",
        PowerLaw(d_in=-0.5),
        adam().epsilon_law,
        readout_learning_rate_law=PowerLaw(),
        source="measured",
    )


def muon(*, variant: QiuOrRmsMatching = "qiu") -> Rule:
    """Muon without shape factor: η ∝ √(d_out/d_in), ε ∝ √(d_in/d_out)/L.

    Args:
      variant: "rms_matching" for η ∝ √max(d_in, d_out), with which the RMS of an update is the same
        at every size, like that of Adam (Liu et al., arXiv 2502.16982): of hidden matrices, whose
        sides grow together. It does not transfer ([Q]).
    """
    _check_variant(variant, QiuOrRmsMatching)
    epsilon = PowerLaw(d_in=0.5, d_out=-0.5, depth=-1)
    if variant == "rms_matching":
        return Rule("muon", PowerLaw(d_in=0.5), epsilon, source="Liu et al.")
    return Rule("muon", PowerLaw(d_in=-0.5, d_out=0.5), epsilon)


def adamuon() -> Rule:
    """AdaMuon: η ∝ 1/d_in, ε ∝ 1/√(d_in·d_out).

    That ε is compared with the orthogonalized momentum, which the size of the gradient does not
    change: `mup` leaves it alone.
    """
    return Rule(
        "adamuon",
        PowerLaw(d_in=-1),
        PowerLaw(d_in=-0.5, d_out=-0.5),
        epsilon_degree=0,
        source="[Q]",
    )


def shampoo(
    *,
    exponent: float = 0.5,
    block_size: int | None = 512,
    relative_eps: bool = True,
    max_preconditioner_dim: int = 10_000,
    sides: Sides = "both",
    variant: QiuOrGupta = "qiu",
) -> Rule:
    """Shampoo with exponent e on each of its sides; arguments as in `scale_by_shampoo`.

    With E the sum over its sides: η ∝ (d_out/d_in)^(1-E) · L^(1-2E) · n_blk^(-E); an absolute
    ε ∝ d_in/(L²·d_out·n_blk), a relative one needs no rule.

    Args:
      exponent: e; block_size, relative_eps, max_preconditioner_dim and sides too are those of the
        transformation.
      block_size: see exponent.
      relative_eps: see exponent.
      max_preconditioner_dim: see exponent.
      sides: see exponent.
      variant: "qiu", or "gupta" with an absolute ε constant, which [G] has for exponent=0.25
        without blocks; it holds where d_out/d_in is fixed.
    """
    _check_variant(variant, QiuOrGupta)
    rule = Rule(
        "shampoo",
        PowerLaw(d_in=-1, d_out=1, depth=1),
        PowerLaw() if relative_eps else PowerLaw(d_in=1, d_out=-1, depth=-2, blocks=-1),
        homogeneity=1 - 4 * exponent,
        learning_rate_per_side=PowerLaw(
            d_in=exponent, d_out=-exponent, depth=-2 * exponent, blocks=-exponent
        ),
        homogeneity_per_side=-2 * exponent,
        epsilon_degree=0 if relative_eps else 2,
        blocking=Blocking(block_size, max_preconditioner_dim, sides),
        source="[Q]",
    )
    if variant == "gupta":
        return replace(rule.with_constant_epsilon(), source="[G]")
    return rule


def soap(
    *,
    block_size: int | None = 512,
    max_preconditioner_dim: int | None = 10_000,
    sides: Sides = "both",
) -> Rule:
    """SOAP; arguments as in `scale_by_soap`.

    Adam's rule, times √b for each rotated side in blocks of length b, in η and in ε.
    """
    return Rule(
        "soap",
        PowerLaw(d_in=-1),
        PowerLaw(d_out=-1, depth=-1),
        learning_rate_per_side=PowerLaw(block=0.5),
        epsilon_per_side=PowerLaw(block=0.5),
        blocking=Blocking(block_size, max_preconditioner_dim, sides),
        source="[Q]",
    )


def kl_shampoo(
    *,
    block_size: int | None = 512,
    max_preconditioner_dim: int | None = 10_000,
    sides: Sides = "both",
) -> Rule:
    """KL-Shampoo; arguments as in `scale_by_kl_shampoo`.

    Adam's rule, times b^¼ for each preconditioned side in blocks of length b, as measured by
    `derive_rule` on hidden matrices: k^-1.01 in blocks, k^-0.46 (rank 16) and k^-0.52 (full rank)
    whole. Whole embeddings and readouts have k^0.38 to k^0.45 and k^-0.61 to k^-0.39, for which
    there is no law here. Its ε is relative and needs no rule. None is published.
    """
    return Rule(
        "kl_shampoo",
        PowerLaw(d_in=-1),
        learning_rate_per_side=PowerLaw(block=0.25),
        epsilon_degree=0,
        blocking=Blocking(block_size, max_preconditioner_dim, sides),
        source="measured",
    )


def kl_soap(
    *,
    block_size: int | None = 512,
    max_preconditioner_dim: int | None = 10_000,
    sides: Sides = "both",
) -> Rule:
    """KL-SOAP; arguments as in `scale_by_kl_soap`: as of SOAP, `derive_rule` measures the same.

    Of hidden matrices k^-1.02 in blocks (SOAP -1.00), k^-0.05 whole and of rank 16 (-0.03), k^-0.53
    whole and of full rank (-0.48).
    """
    as_soap = soap(
        block_size=block_size, max_preconditioner_dim=max_preconditioner_dim, sides=sides
    )
    return replace(as_soap, name="kl_soap", source="measured")


def normuon() -> Rule:
    """NorMuon: as of Muon, to whose norm its update is scaled; `derive_rule` measures the same."""
    return replace(muon(), name="normuon", source="measured")


def grafted(magnitude_rule: Rule) -> Rule:
    """Q1#Q2: the rule of Q1, whose update sets the size.

    An ε of the graft itself, which is added to the norm of Q2's update, is ∝ √(d_out/d_in)/η_Q2.
    """
    return replace(magnitude_rule, name=f"{magnitude_rule.name}#", source="[Q]")


def spectrally_normalized(inner: Rule | None = None) -> Rule:
    """A direction followed by `normalize_spectral_norm`: η is constant, ε as without.

    Args:
      inner: rule of the direction; None for one whose ε needs no rule.
    """
    if inner is None:
        return Rule("spectrally normalized", PowerLaw(), epsilon_degree=0, source="[Q]")
    return replace(
        inner.with_learning_rate(PowerLaw()),
        name=f"spectrally normalized {inner.name}",
        homogeneity=0.0,
        homogeneity_per_side=0.0,
        source="[Q]",
    )


def hyperball(*, variant: MeasuredOrPublished = "published") -> Rule:
    """`mup_jax.hyperball`: η constant, but ∝ 1/√d_in at readouts.

    η is relative to ‖W‖_F, which is ∝ √d_out in random matrices of entries N(0, 1/d_in), and in
    those that begin at zero. Then an update of full stable rank, as of Muon in large batches, moves
    outputs by as much at every width; of readouts, whose rank is that of the vocabulary, one that
    is ∝ 1/√d_in relative to them.

    Args:
      variant: "published": Wen et al. report transfer of hidden matrices without any factor, also
        with Adam. Or "measured": 1/√d_in for hidden matrices too, which updates of a stable rank
        that does not grow with the width need, as in the first steps.
    """
    _check_variant(variant, MeasuredOrPublished)
    law = PowerLaw(d_in=-0.5)
    if variant == "measured":
        return Rule("hyperball", law, epsilon_degree=0, source="measured")
    return Rule(
        "hyperball",
        PowerLaw(),
        readout_learning_rate_law=law,
        epsilon_degree=0,
        source="Wen et al., measured",
    )


def budget_factor(*, batch_ratio: float = 1.0, duration_ratio: float = 1.0) -> float:
    """The factor of η for another batch size and training duration: √(batch / duration).

    It holds at any width and depth, for optimizers that normalize the gradient as Adam does, and
    keeps the noise of a whole run what it is. Multiply the learning rate of the base model by it.

    Args:
      batch_ratio: tokens per step, over those with which η was tuned.
      duration_ratio: tokens of the run, over those with which η was tuned.

    Returns:
      √κ for κ times the batch, 1/√κ for κ times the duration at a fixed batch.

    Raises:
      ValueError: a ratio is not positive.

    References:
      Mlodozeniec et al., `Completed hyperparameter transfer <https://arxiv.org/abs/2512.22382>`_,
      2025; Malladi et al., `SDEs of adaptive methods <https://arxiv.org/abs/2205.10287>`_, 2022.
    """
    if min(batch_ratio, duration_ratio) <= 0:
        raise ValueError(
            f"batch_ratio={batch_ratio}, duration_ratio={duration_ratio}: give ratios above 0"
        )
    return math.sqrt(batch_ratio / duration_ratio)
