"""Liger's fused kernels in a loaded model: norms, rotary embedding, MLP (https://github.com/linkedin/Liger-Kernel).

Liger knows for each family how its norms round and which of its layers a kernel fits; its own functions change the
modules of this model. They also change classes for whatever is loaded later in the process, which a model that is
checked on a CPU would not survive: that is put back. Only the registry imports this file: the package is optional.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from sftdist.model.backends.interface import first_line
from sftdist.model.backends.triton_loss import NOT_BUILT

_LAYERS = {"rope", "rms_norm", "swiglu", "geglu"}  # the switches of Liger's functions that are set; all others are off
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton's interpreter takes tensors of the CPU


def why_not(config: PreTrainedConfig, device: torch.device) -> str:
    """One line that says why Liger's kernels cannot be used for this model on this device; '' where they can."""
    if device.type != "cuda" and not _INTERPRETED:
        return f"liger runs on CUDA, not on {device}"
    if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger has no kernels for {config.model_type}"
    if config.get_text_config(decoder=True) is not config:
        return f"liger is used for text models only, and {config.model_type} is none"
    try:
        _try_out(device)
    except NOT_BUILT as error:
        return f"liger does not run on {device}: {first_line(error)}"
    return ""


def _try_out(device: torch.device) -> None:
    """Forward and backward of two kernels, small."""
    with torch.enable_grad():
        rows, weight = (torch.ones(shape, device=device, requires_grad=True) for shape in ((4, 16), (16,)))
        normed = LigerRMSNormFunction.apply(rows, weight, 1e-6)
        torch.autograd.grad(LigerSiLUMulFunction.apply(normed, rows * 1.0).sum(), (rows, weight))


def use(model: PreTrainedModel) -> None:
    """Put Liger's kernels into the modules of this model; parameters and their names stay as they are.

    Mixtures of experts keep their experts: Liger's fuse the routing, too.
    """
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    switches = {name: name in _LAYERS for name in inspect.signature(apply).parameters if name != "model"}
    if any(getattr(model.config, name, None) for name in _EXPERTS):
        switches.update({name: False for name in ("swiglu", "geglu") if name in switches})
    modeling = sys.modules[type(model).__module__]
    before = dict(vars(modeling))
    apply(model=model, **switches)
    for name, plain in before.items():
        fast = vars(modeling)[name]
        if fast is not plain:
            setattr(modeling, name, _chosen_by_device(fast, plain))


def _chosen_by_device(fast: Any, plain: Any) -> Any:
    """What stays in place of a name of the modelling file. Attention calls its rotary embedding by such a name, so that
    one function serves all models of a family: on a GPU the kernel, elsewhere what was there. Classes are put back."""
    if isinstance(plain, FunctionType):
        return partial(_rotary, fast, plain)
    return plain


def _rotary(fast: Callable[..., Any], plain: Callable[..., Any], q: Tensor, *args: Any, **kwargs: Any) -> Any:
    chosen = fast if q.device.type == "cuda" or _INTERPRETED else plain
    return chosen(q, *args, **kwargs)
