"""`export_check` for a folder that holds an adapter alone: it is loaded by PEFT, onto the base that it names."""

from __future__ import annotations

import sys

from sftdist.model.lora import load_adapter
from sftdist.training.export_check import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], load_adapter))
