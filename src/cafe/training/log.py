"""The log of a run: TensorBoard, and one JSON line a measured step."""

import json
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Log:
    """Writes each measured step to TensorBoard and to `log.jsonl`."""

    def __init__(self, directory: Path) -> None:
        self.file = (directory / "log.jsonl").open("w", buffering=1)
        self.board = SummaryWriter(str(directory / "tensorboard"))
        self.started = time.monotonic()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One record."""
        seconds = round(time.monotonic() - self.started, 2)
        self.file.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
