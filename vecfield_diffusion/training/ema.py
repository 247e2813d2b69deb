"""The exponential moving average of the weights, with which one samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """An average whose memory is counted in samples seen, so that it does not depend on the batch size.

    Arguments:
        network: The network to follow.
        half_life: Samples after which a weight's share has halved. Early in training it is at most `ramp` of the
            samples seen so far, so that the random start is soon forgotten (Karras et al., NeurIPS 2022, appendix F).
        ramp: That share.
        local: Gives the part of a weight that this process keeps, without a copy; see `training/distributed.py`.

    Raises:
        ValueError: A half-life that is negative.
    """

    def __init__(
        self,
        network: nn.Module,
        half_life: float,
        ramp: float = 0.05,
        *,
        local: Callable[[Tensor], Tensor] = lambda weight: weight,
    ) -> None:
        if half_life < 0:
            raise ValueError(f"ema must be >= 0 samples, got {half_life}")
        self.half_life, self.ramp, self.local = half_life, ramp, local
        self.weights = {name: value.detach().clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, batch: int, samples: int) -> None:
        """Takes in the weights after a step of `batch` samples, `samples` in all."""
        half_life = min(self.half_life, self.ramp * samples)
        keep = 0.5 ** (batch / half_life) if half_life > 0 else 0.0
        averages, values = [], []
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                averages.append(self.local(self.weights[name]))
                values.append(self.local(value.detach()))
            else:  # a counter has no average
                self.weights[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - keep)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averaged weights, as `network.load_state_dict` takes them."""
        return self.weights

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Continues from averaged weights."""
        for name, value in weights.items():
            self.weights[name].copy_(value)

    def adopt(self, network: nn.Module, part: nn.Module) -> None:
        """Takes the state of a part of the network as it is, of which no average is to be taken."""
        prefix = next(name for name, module in network.named_modules() if module is part)
        for name, value in part.state_dict(prefix=f"{prefix}.").items():
            self.weights[name] = value.detach().clone()

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """Within the block the network has the averaged weights, and is in evaluation mode."""
        weights = {name: value.clone() for name, value in network.state_dict().items()}
        network.load_state_dict(self.weights)
        network.eval()
        try:
            yield
        finally:
            network.load_state_dict(weights)
