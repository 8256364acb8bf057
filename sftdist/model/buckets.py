"""The size of the messages in which gradients are reduced; arithmetic only, for the engine and the planner."""

from __future__ import annotations

# 128 MiB in float32: long enough for the full rate of a link, and so short that the first of them is on its way early
# (an 8B model has some 240). DeepSpeed's own default, 500 million, takes two buffers of 2 GB whatever the model.
BUCKET_ELEMENTS = 2**25


def reduce_bucket(trainable: int) -> int:
    """Elements of one bucket, for so many trainable parameters; a larger parameter is reduced alone."""
    return max(1, min(trainable, BUCKET_ELEMENTS))
