"""Progress on standard error: a bar in a terminal, plain lines elsewhere."""

import sys
import time

LINE_EVERY_S = 5.0


class Progress:
    """Counts frames; shows fps and the time left."""

    def __init__(self, num_frames: int, fps: float, *, quiet: bool = False):
        self.num_frames, self.fps, self.quiet = num_frames, fps, quiet
        self.start = self.last_line = time.perf_counter()
        self.bar = None

    def __enter__(self) -> "Progress":
        if not self.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.num_frames, unit="frame", dynamic_ncols=True)
        return self

    def update(self, done: int) -> None:
        """`done` frames are in the file."""
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif not self.quiet and (now - self.last_line >= LINE_EVERY_S or done == self.num_frames):
            rate = done / (now - self.start)
            left = (self.num_frames - done) / rate
            line = f"{done}/{self.num_frames} frames ({done / self.fps:.1f} s), {rate:.1f} frames/s, {left:.0f} s left"
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
            self.last_line = now

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
