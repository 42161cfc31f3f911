"""Matrix optimizers in torch, eager, on gradients like ours: one of them in a process of its own.

    python -m experiments.accelerator.torch_peers PEER LAYERS WIDTH BLOCK DEVICE

prints a row as JSON; PEER is "muon" or "soap". Torch and JAX bring CUDA libraries of their own, and
a process that dies of that takes nothing along.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from experiments.accelerator.timing import time_steps
from experiments.optimizer_cases import FREQUENCY, layer_shapes


class Soap:
    """SOAP (Vyas et al. 2024) without anything but batched products and QR factorizations.

    Bases begin at the identity, and all blocks `(k, b, b)` are refreshed on the same step.
    """

    def __init__(self, blocks: torch.Tensor, b1: float = 0.9, b2: float = 0.98) -> None:
        self.b1, self.b2, self.step = b1, b2, 0
        self.m, self.v = torch.zeros_like(blocks), torch.zeros_like(blocks)
        self.grams = [torch.zeros_like(blocks) for _ in range(2)]
        eye = torch.eye(blocks.shape[-1], device=blocks.device)
        self.bases = [eye.expand_as(blocks).clone() for _ in range(2)]

    def update(self, g: torch.Tensor) -> torch.Tensor:
        self.m.lerp_(g, 1 - self.b1)
        self.grams[0].lerp_(g @ g.mT, 1 - self.b2)
        self.grams[1].lerp_(g.mT @ g, 1 - self.b2)
        if self.step % FREQUENCY == 0:
            old = self.bases
            self.bases = [
                torch.linalg.qr(gram @ q)[0] for gram, q in zip(self.grams, old, strict=True)
            ]
            left, right = ((a.mT @ b).square() for a, b in zip(old, self.bases, strict=True))
            self.v = left.mT @ self.v @ right
        self.step += 1
        left, right = self.bases
        self.v.lerp_((left.mT @ g @ right).square(), 1 - self.b2)
        direction = left.mT @ self.m @ right / (self.v.sqrt() + 1e-8)
        correction = (1 - self.b2**self.step) ** 0.5 / (1 - self.b1**self.step)
        return left @ direction @ right.mT * correction


def muon(layers: int, width: int, _: int, device: str) -> Callable[[Any], Any]:
    """Steps of `torch.optim.Muon` on one parameter per matrix."""
    parameters = []
    for _ in range(layers):
        for shape in layer_shapes(width).values():
            parameter = torch.nn.Parameter(torch.zeros(shape, device=device))
            parameter.grad = torch.randn(shape, device=device)
            parameters.append(parameter)
    optimizer = torch.optim.Muon(parameters, lr=1e-3)
    return lambda _: optimizer.step()


def soap(layers: int, width: int, block: int, device: str) -> Callable[[Any], Any]:
    """Steps of `Soap` on the blocks of all matrices in one stack."""
    blocks = layers * sum(m * n for m, n in layer_shapes(width).values()) // block**2
    gradient = torch.randn((blocks, block, block), device=device)
    optimizer = Soap(gradient)
    return lambda _: optimizer.update(gradient)


def main(peer: str, layers: int, width: int, block: int, device: str) -> None:
    on_gpu = device == "cuda"
    row: dict[str, Any] = {"layers": layers, "version": torch.__version__}
    advance = {"muon": muon, "soap": soap}[peer](layers, width, block, device)
    wait = (lambda _: torch.cuda.synchronize()) if on_gpu else (lambda _: None)
    # What a step takes beside its gradients and its state, which are there after the first.
    advance(None)
    wait(None)
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times, _ = time_steps(advance, None, steps=FREQUENCY, wait=wait)
    if on_gpu:
        row["temporary_megabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    print(json.dumps(row | times))


if __name__ == "__main__":
    _, peer, layers, width, block, device = sys.argv
    main(peer, int(layers), int(width), int(block), device)
