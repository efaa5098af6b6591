"""The report is one page that needs nothing else, and a browser shows it without a complaint."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from longvid.contact_sheet import write_png
from pipelines.bench_report import write_report
from pipelines.record import write_json
from tests.pipelines.conftest import save_film

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def record(name, nproc, seconds):
    metrics = {
        "wall_s": 4.0 / nproc, "first_frame_s": 1.0, "block_p50_s": 0.1, "block_p95_s": 0.2, "steady_fps": 9.0,
        "fps": 8.0 * nproc, "peak_memory_mb": [300.0] * nproc, "bytes_sent": [2**20] * nproc,
        "latent_sha256": "ab" * 32,
        "seconds_of_video": seconds, "idle_fraction": [0.1] * nproc, "bytes_exchanged": [0] * nproc,
        "bytes_to": [{"1": 2**20}, {"0": 2**20}][:nproc], "config": {"prompt": "<b>bold</b>"}, "layout": {},
    }  # fmt: skip
    idle = {"measured_idle": [0.2] * nproc, "planned_idle": [0.1] * nproc}
    return {
        "case": {"name": name, "model": None, "method": None, "nproc": nproc, "threads": 1, "layout": "stages",
                 "words": []},
        "process_s": 5.0, "metrics": metrics, "sweep": "longvid bench --out x", "date": "2026-01-01",
        "schedule": {**idle, "measured_makespan_s": 3.0, "planned_makespan_s": 2.5,
                     "planned_at_its_speed_s": 2.9}, "command": ["longvid"],
        "hardware": {"cpu": "<cpu>", "cores": 2, "gpus": []}, "versions": {"torch": "2"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A folder as a sweep leaves it, and its report."""
    folder = tmp_path_factory.mktemp("sweep")
    records = [record("one", 1, 3.0), record("two", 2, 3.0)]
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    for rank, name in enumerate(("one", "two")):
        save_film(folder / f"{name}.mp4", 24)
        write_png(folder / f"{name}.png", np.full((20, 30, 3), 90, np.uint8))
        events = [{"ph": "X", "pid": pid, "tid": rank, "name": "pass", "ts": 0.0, "dur": 2e6,
                   "args": {"tick": 0, "lane": 0, "blocks": [0]}} for pid in (0, 1)]  # fmt: skip
        write_json(folder / f"{name}.trace.json", {"traceEvents": events})
    return write_report(folder)


class Parsed(HTMLParser):
    """Tags in order, and that each is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_everything_is_inside(page):
    text = page.read_text()
    parsed = Parsed(text)
    assert not parsed.open and not [tag for tag, _ in parsed.tags if tag == "script"]
    sources = [attrs["src"] for _, attrs in parsed.tags if "src" in attrs]
    assert len(sources) == 4 and len([tag for tag, _ in parsed.tags if tag == "video"]) == 2
    starts = {"image/png": b"\x89PNG", "video/mp4": b"ftyp"}
    for source in sources:
        kind, data = re.fullmatch(r"data:(.*?);base64,(.*)", source).groups()
        assert starts[kind] in base64.b64decode(data, validate=True)[:16]
    without_data = re.sub(r"data:[^\"]*", "", text).replace("http://www.w3.org/2000/svg", "")
    assert "http" not in without_data and "url(" not in without_data and "@import" not in without_data
    assert "<b>" not in text and "<cpu>" not in text and "longvid bench --out x" in text
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 3 + 5 + 2, "curves, drift, processes against time"
    assert {"measured 0", "planned 0", "measured 1", "planned 1"} <= set(re.findall(r"(?:measured|planned) \d", text))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; Debian has it as the package chromium")
def test_a_browser_shows_it_without_a_complaint(page, tmp_path):
    """A copy with a script that looks at itself and says what it found in its title."""
    script = """<script>addEventListener("load", () => setTimeout(() => { document.title = JSON.stringify({
      pictures: [...document.images].map(i => i.complete && i.naturalWidth),
      videos: [...document.querySelectorAll("video")].map(v => [v.error === null, v.videoWidth]),
      charts: [...document.querySelectorAll("svg")].every(s => s.getBoundingClientRect().height > 20),
      overflows: document.documentElement.scrollWidth > innerWidth }) }, 1500))</script>"""
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text().replace("</head>", script + "</head>"))
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
             "--virtual-time-budget=6000", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1250,900",
             copy.as_uri()]  # fmt: skip
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    title = re.search("<title>(.*?)</title>", ran.stdout)
    found = json.loads(title[1])
    assert found["pictures"] == [30, 30] and found["charts"] and not found["overflows"]
    assert all(fine for fine, _ in found["videos"]) and len(found["videos"]) == 2
    assert not [line for line in ran.stderr.splitlines() if "CONSOLE" in line], ran.stderr


@pytest.mark.parametrize("words, said", [
    (["report"], "report takes one folder, not 0: longvid bench report DIR"),
    (["report", "x"], "x/results.jsonl is not there"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(longvid, here, words, said):
    ran = longvid("bench", *words, model=None)
    assert ran.code == 2 and said in ran.err and len(ran.err.splitlines()) == 1
