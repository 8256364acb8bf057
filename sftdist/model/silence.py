"""Imported before PEFT, which imports bitsandbytes where it is installed: that looks for a kernel of the Hub on some
CPUs, which nothing here uses, and complains at every start that it is not there."""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
