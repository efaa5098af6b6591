"""The command `longvid evaluate`: checks what was asked, makes videos where prompts are given, measures, writes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipelines.evaluate import Result, Source, as_json, evaluate_video, find_sources, source_of, summary
from pipelines.evaluate_prompts import held_out_prompts, make_videos, plan_videos, prompts_of
from pipelines.evaluate_report import check_report, table, write_report
from pipelines.film_features import frechet
from pipelines.record import versions


def evaluate(
    videos: str | None,
    prompts: str | None,
    request: dict,
    out: Path,
    *,
    num_prompts: int | None,
    has_frechet: bool,
    overwrite: bool,
    say: Callable[[str], None],
) -> Iterator[str]:
    """Measure `videos`, or those made of `prompts` with the flags of `request`; yields lines that sum up.

    Raises ValueError for a wrong request before anything is made.
    """
    if (videos is None) == (prompts is None):
        raise ValueError("give a folder of videos, or --prompts; not both: longvid evaluate VIDEOS --out DIR")
    check_report(out, overwrite=overwrite)
    if videos is not None:
        sources = _given(Path(videos), request, num_prompts)
    else:
        sources = list(_made(prompts, request, out, num_prompts, overwrite, say))
    results = []
    for number, source in enumerate(sources, 1):
        results.append(evaluate_video(source))
        say(f"{number}/{len(sources)} {source.video.name}: {_in_short(results[-1])}")
    content = {
        "videos": list(as_json(results, sources)),
        "mean": summary(results),
        "frechet": _frechet(results, sources) if has_frechet else None,
        "versions": versions(),
    }
    write_report(out, content, results)
    yield from table(content)


def _given(videos: Path, request: dict, num_prompts: int | None) -> list[Source]:
    """Sources of videos that are there; flags that say how to make some are refused."""
    surplus = sorted({*request, *(["num_prompts"] if num_prompts is not None else [])} - {"prompt"})
    if surplus:
        flag = surplus[0].replace("_", "-").replace("num-steps", "num-inference-steps")
        raise ValueError(f"--{flag} says how videos are made, and {videos} are there already; leave it out, "
                         "or give --prompts in place of videos")  # fmt: skip
    return find_sources(videos, request.get("prompt"))


def _made(
    prompts: str, request: dict, out: Path, num_prompts: int | None, overwrite: bool, say: Callable[[str], None]
) -> Iterator[Source]:
    """Make the videos of prompts, in a folder of their own."""
    if "prompt" in request:
        raise ValueError("--prompt and --prompts both say what to show; give one of them")
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"num_prompts={num_prompts} must be at least 1; try 8")
    found = prompts_of(prompts)[:num_prompts]
    folder = out / "videos"
    planned = plan_videos(found, folder, request, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (video, (_, _, prompt)) in enumerate(zip(make_videos(planned), planned, strict=True), 1):
        say(f"{number}/{len(planned)} made {video.name}: {prompt.text}")
        yield source_of(video, world=prompt.world)


def _frechet(results: Sequence[Result], sources: Sequence[Source]) -> dict | None:
    """To true films of the prompts' worlds if all are known, else of the held-out ones."""
    worlds = [source.world for source in sources if source.world]
    if len(worlds) < len(sources):
        worlds = [prompt.world for prompt in held_out_prompts()]
    return frechet(np.concatenate([result.clips for result in results]), worlds)


def _in_short(result: Result) -> str:
    adherence = result.figures["adherence"]
    if adherence is None:
        return "its prompt is unknown, or names nothing that can be read" if not result.readings else ""
    share = adherence["share"]
    return ", ".join(f"{name} {value:.2f}" for name, value in share.items() if value is not None)
