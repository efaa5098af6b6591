"""What training says as it goes: a line of JSON for each record and, if asked for, TensorBoard's curves."""

import json
from pathlib import Path


class TrainingLog:
    """`log.jsonl` and, with `has_tensorboard`, `tensorboard/` in a folder. One that is not kept writes nothing.

    Raises ValueError where TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, *, is_new: bool, has_tensorboard: bool, is_kept: bool):
        self.lines = (folder / "log.jsonl").open("w" if is_new else "a") if is_kept else None
        self.curves = new_curves(folder / "tensorboard") if has_tensorboard and is_kept else None

    def add(self, record: dict) -> dict:
        """Write a record (`step` and figures by name) and give it back."""
        if self.lines:
            self.lines.write(json.dumps(record) + "\n")
            self.lines.flush()
        if self.curves:
            for name, value in record.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.curves.add_scalar(name, value, record["step"])
            self.curves.flush()
        return record

    def close(self) -> None:
        """Close the files."""
        for each in (self.lines, self.curves):
            if each:
                each.close()


def new_curves(folder: Path):
    """TensorBoard's writer of curves into a folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard is not installed; pip install 'longvid[train]', or leave --tensorboard out") \
            from None  # fmt: skip
    return SummaryWriter(str(folder))
