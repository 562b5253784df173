"""Another library's model in fp64 throughout, where its code casts to fp32 by name."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Double(TorchFunctionMode):
    """Inside, `.float()`, `.to(torch.float32)` and `dtype=torch.float32` mean fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            return args[0].double()
        kwargs = {name: widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(widened, args), **kwargs)
