"""Run by the doctor in a process of its own: the attention and kernels of a training here, the hub's folders."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from huggingface_hub import constants
from transformers import AutoConfig

from sftdist.commands.doctor_checks.probe import FACTS
from sftdist.model.attention import choose
from sftdist.model.kernels import choose_kernels
from sftdist.model.quantised import why_not


def main() -> int:
    print(FACTS + json.dumps(facts()))
    return 0


def facts() -> dict[str, Any]:
    """The choice is for a Llama in bfloat16, by the function that training asks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    llama = AutoConfig.for_model("llama")
    choice = choose("auto", device, torch.bfloat16, llama)
    kernels = choose_kernels("auto", device, llama)
    return {
        "attention": choice.name,
        "rejected": list(choice.rejected),
        "kernels": [kernels.layers, kernels.loss],
        "kernels_rejected": list(kernels.rejected),
        "qlora": why_not(device, torch.bfloat16),
        "hub_cache": constants.HF_HUB_CACHE,
        "offline": bool(constants.HF_HUB_OFFLINE),
    }


if __name__ == "__main__":
    sys.exit(main())
