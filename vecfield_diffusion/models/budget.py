"""Networks whose declared sizes do not fit into memory are refused before any memory is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vecfield_diffusion.memory import available, readable

#: What makes a tensor from sizes: all that layers of networks call.
MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


class Budget(TorchFunctionMode):
    """Within the block, tensors may be made of `limit` bytes together; by default, of the memory that is left.

    Arguments:
        limit: The number of bytes; None for the memory that is left, or no limit where nothing says how much that is.

    Raises:
        ValueError: More is asked for. What is asked for has not been taken then.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit, self.taken = available() if limit is None else limit, 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(options or {})
        if function in MAKERS and self.limit is not None:
            sizes = options.get("size", arguments[0] if arguments and isinstance(arguments[0], Sequence) else arguments)
            kind = options.get("dtype") or torch.get_default_dtype()
            self.taken += math.prod(sizes) * kind.itemsize
            if self.taken > self.limit:
                raise ValueError(
                    f"the sizes declared ask for {readable(self.taken)} of memory or more, but "
                    f"{readable(self.limit)} are free"
                )
        return function(*arguments, **options)
