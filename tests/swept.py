"""Stands in for `sftdist` where a test is about the sweep and not about its jobs: `swept.py train WORD ...` does what
`run.note=` says and leaves what a run leaves, without the seconds that importing torch takes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from types import FrameType


def main(words: list[str]) -> int:
    values = {key.lstrip("+"): value.strip("'") for key, value in (word.split("=", 1) for word in words)}
    run_dir, doing = Path(values["run.dir"]), values["run.note"]
    run_dir.mkdir(parents=True, exist_ok=True)
    start = uuid.uuid4().hex

    def status(state: str, code: int, reason: str = "") -> int:
        text = json.dumps({"state": state, "code": code, "reason": reason, "step": 2, "start": start})
        (run_dir / "status.json").write_text(text)
        return code

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(status("preempted", 75, "stopped after a complete save"))

    left = {"words": words, "began": time.time(), "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}
    left |= {"threads": os.environ.get("OMP_NUM_THREADS"), "parent": os.environ.get("SFTDIST_PARENT")}
    (run_dir / "started.json").write_text(json.dumps(left))
    print(f"doing {doing}", flush=True)
    if doing == "mute":
        print("sftdist train: error: data.train: there is no such file", flush=True)
        return 3
    if doing == "fail":
        return status("failed", 1, "the loss is nan in step 2")
    if doing == "wait":
        signal.signal(signal.SIGTERM, stop)
        status("running", 1)
    if doing in ("wait", "deaf"):
        time.sleep(60)
    if doing == "killed":
        status("running", 1, "training")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5 if doing == "slow" else 0)
    loss = float(values.get("seed", 0))
    lines = [{"kind": "train", "step": 2, "loss": 1.5}, {"kind": "eval", "step": 2, "eval/loss": loss}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "started.json").write_text(json.dumps(left | {"ended": time.time()}))
    return status("done", 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
