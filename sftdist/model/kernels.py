"""The kernels of a model beside its attention: Liger's or torch's in the layers, triton's or torch's in the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sftdist.core.errors import ConfigError
from sftdist.model.backends.registry import open_layer_kernels, open_loss_kernel
from sftdist.model.loss import RowLosses, rows_into_gradients


@dataclass(frozen=True, slots=True)
class Kernels:
    """`layers`: torch or liger. `loss`: torch or triton. `rejected`: why each faster one will not run."""

    layers: str = "torch"
    loss: str = "torch"
    rejected: tuple[str, ...] = ()

    def __str__(self) -> str:
        reasons = f" ({'; '.join(self.rejected)})" if self.rejected else ""
        return f"layers {self.layers}, loss {self.loss}{reasons}"

    @property
    def row_losses(self) -> RowLosses:
        """The function that the chunks of the loss go through."""
        if self.loss == "torch":
            return rows_into_gradients
        opened = open_loss_kernel()
        assert not isinstance(opened, str)  # it was opened when it was chosen
        return opened.rows_into_gradients


def choose_kernels(name: str, device: torch.device, config: PreTrainedConfig, *, compiled: bool = False) -> Kernels:
    """`auto` takes whatever is there and runs on the device; `torch` nothing else; `liger` refuses where it cannot be.

    `compiled`: torch.compile fuses the layers itself, and cannot look into Liger's kernels. Raises ConfigError with the
    reason.
    """
    if name == "torch":
        return Kernels()
    if name == "auto" and device.type != "cuda":
        return Kernels(rejected=("fused kernels run on CUDA",))
    no_layers = "torch.compile fuses the layers itself" if compiled else _why_no_layers(device, config)
    if no_layers and name == "liger":
        raise ConfigError(f"model.kernels=liger: {no_layers}; set model.kernels=auto")
    no_loss = _why_no_loss(device)
    return Kernels(
        layers="torch" if no_layers else "liger",
        loss="torch" if no_loss else "triton",
        rejected=tuple(reason for reason in (no_layers, no_loss) if reason),
    )


def use_layer_kernels(model: PreTrainedModel) -> None:
    """Put Liger's kernels into the modules of a loaded model, before an adapter is attached."""
    opened = open_layer_kernels()
    assert not isinstance(opened, str)  # it was opened when it was chosen
    opened.use(model)


def _why_no_layers(device: torch.device, config: PreTrainedConfig) -> str:
    opened = open_layer_kernels()
    return opened if isinstance(opened, str) else opened.why_not(config, device)


def _why_no_loss(device: torch.device) -> str:
    opened = open_loss_kernel()
    return opened if isinstance(opened, str) else opened.why_not(device)
