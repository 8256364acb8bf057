"""What an attention backend is given and what it has to say about itself.

A backend attends inside each document of one packed row. It knows nothing of models: it gets the
tensors of one layer, the documents, and the few arguments by which the layers of today differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sftdist.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of one packed row lie.

    `cu_seqlens`: [D+1] int32 on the device of the row, from 0 to T, strictly increasing.
    `lengths`: the same as D Python integers, read once per row so that no layer waits for the device.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, cu_seqlens: Tensor, lengths: Sequence[int] | None = None) -> Documents:
        """`lengths`: as the loader knows them; without them the device is asked, and the program waits for it."""
        if lengths is None:
            lengths = tuple(end - start for start, end in pairwise(_bounds(cu_seqlens)))
        if not lengths or min(lengths) < 1 or len(lengths) != len(cu_seqlens) - 1:
            raise ValueError(f"{len(cu_seqlens)} bounds need documents of at least one token, got {tuple(lengths)}")
        return cls(cu_seqlens=cu_seqlens, lengths=tuple(lengths))

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Documents:
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls.of(bounds.to(device, non_blocking=True), lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def positions(self) -> Tensor:
        """[T] int64: 0, 1, 2, ... in each document."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.cu_seqlens.device)

    def numbers(self) -> Tensor:
        """[1,T] int32: 0 in the first document, 1 in the second, ..."""
        lengths = torch.tensor(self.lengths)
        numbers = torch.arange(len(self.lengths), dtype=torch.int32).repeat_interleave(lengths)
        return numbers[None].to(self.cu_seqlens.device, non_blocking=True)

    def model_arguments(self) -> dict[str, Any]:
        """The extra keyword arguments of a model call.

        `documents` is what our attention reads. The other five are transformers' own names for the same thing, so
        that layers without attention that honour them (convolutions and recurrences) restart at each document; a
        single document needs no boundary, and such layers refuse to be given one that they cannot honour.
        """
        if len(self.lengths) == 1:
            return {"documents": self}
        return {
            "documents": self,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
            "seq_idx": self.numbers(),
        }


def _bounds(cu_seqlens: Tensor) -> list[int]:
    bounds: list[int] = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or any(end <= start for start, end in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must start at 0 and increase strictly, got {bounds}")
    return bounds


@dataclass(frozen=True, slots=True)
class LayerArguments:
    """How the attention of one layer differs from plain causal attention.

    `sliding_window` w: query i sees the keys i-w+1 .. i. `softcap` c: scores become c * tanh(s / c).
    `s_aux`: [H], one extra logit per head in the softmax that carries no value (attention sink).
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    s_aux: Tensor | None = None
    dropout: float = 0.0

    def in_use(self, longest: int) -> set[str]:
        """The names of the arguments that change the result for documents of at most `longest` tokens."""
        used = {
            "sliding_window": self.sliding_window is not None and self.sliding_window < longest,
            "softcap": self.softcap is not None,
            "s_aux": self.s_aux is not None,
            "dropout": self.dropout > 0.0,
        }
        return {name for name, is_used in used.items() if is_used}


Attend = Callable[[Tensor, Tensor, Tensor, Documents, LayerArguments], Tensor]


@dataclass(frozen=True, slots=True)
class Backend:
    """`attend(query [1,H,T,D], key [1,K,T,D], value [1,K,T,E], documents, arguments) -> [1,T,H,E]`.

    `supports`: the fields of LayerArguments that it honours. `probe` raises if it cannot run on a device.
    """

    name: str
    supports: frozenset[str]
    attend: Attend

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, arguments: LayerArguments
    ) -> Tensor:
        refused = arguments.in_use(documents.longest) - self.supports
        if refused:
            raise ConfigError(
                f"model.attention={self.name} was given {', '.join(sorted(refused))} by this model; "
                f"it supports {', '.join(sorted(self.supports)) or 'plain causal attention only'}: "
                "set model.attention=sdpa"
            )
        if query.shape[2] != documents.tokens:
            raise ValueError(f"the row has {query.shape[2]} tokens, its documents {documents.tokens}")
        return self.attend(query, key, value, documents, arguments)


def first_line(error: Exception) -> str:
    """The first line of a message, or the error's name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
