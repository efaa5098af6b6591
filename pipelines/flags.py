"""The command line: commands and their flags. Imports nothing heavy, so that `longvid --help` answers at once."""

import argparse

EXIT_WRONG_REQUEST = 2


class Parser(argparse.ArgumentParser):
    """Takes flags by their whole names; says what is wrong in one line."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> None:
        """Exit 2 with one line."""
        self.exit(EXIT_WRONG_REQUEST, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> Parser:
    """All commands and their flags."""
    top = Parser(prog="longvid", description="Minutes of video from a prompt: rolling block-wise denoising.")
    commands = top.add_subparsers(
        dest="command", required=True, metavar="generate | extend | plan | bench | train | data | lora | evaluate"
    )
    generate = commands.add_parser("generate", help="make a video from a prompt")
    generate.add_argument("--image", metavar="F", help="a picture that the video starts from (PNG, JPEG, WebP)")
    generate.add_argument("--resume", metavar="DIR", help="go on with a run that was cut, generate or extend; of other "
                          "flags only --nproc, --threads, --max-restarts and --quiet are taken")  # fmt: skip
    extend = commands.add_parser("extend", help="go on with a video")
    extend.add_argument("--video", metavar="F", required=True, help="the video to go on with (any that decord reads)")
    plan = commands.add_parser("plan", help="print the matrix of steps and the list of passes")
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.add_argument("--image", metavar="F", help="plan for a video that starts from a picture")
    _add_grid_flags(plan)
    for command in (generate, plan):
        command.add_argument("--prompts-file", metavar="F", help="several prompts, one a line: a video of each, "
                             "NAME-1.mp4 and so on, made together")  # fmt: skip
    for command in (generate, extend, plan):
        _add_video_flags(command)
    for command in (generate, extend):
        _add_output_flags(command)
    _add_bench_flags(
        commands.add_parser("bench", help="measure speed and memory of many cases, or compare two results")
    )
    _add_train_flags(commands.add_parser("train", help="train the embedded model; fine-tune and distil others"))
    _add_data_flags(commands.add_parser("data", help="write the procedural films as a folder of videos"))
    _add_lora_flags(commands.add_parser("lora", help="merge a LoRA into a model folder"))
    _add_evaluate_flags(
        commands.add_parser("evaluate", help="measure videos, or a model by the videos of many prompts")
    )
    return top


def _add_video_flags(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("what")
    model.add_argument(
        "--model",
        metavar="M",
        help="a model folder, a hub id, or a model in the box: tiny-fast, tiny (default: tiny-fast)",
    )
    model.add_argument("--prompt", metavar="TEXT", help="what to show")
    model.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    length = command.add_argument_group("length and size")
    length.add_argument("--seconds", type=float, metavar="S")
    length.add_argument("--num-frames", type=int, metavar="N", help="4n + 1; of extend the first is the input's last")
    length.add_argument("--fps", type=int, metavar="N")
    length.add_argument("--height", type=int, metavar="N", help="pixels")
    length.add_argument("--width", type=int, metavar="N", help="pixels")
    method = command.add_argument_group("method")
    method.add_argument("--method", metavar="NAME", help="rolling, dualparal, skyreels-sync, skyreels-async, "
                        "rolling-forcing or self-forcing")  # fmt: skip
    method.add_argument("--num-inference-steps", "--num-steps", type=int, metavar="N", dest="num_steps")
    method.add_argument("--first-steps", type=int, metavar="N", help="of a video's first latent, if more")
    method.add_argument("--guidance-scale", type=float, metavar="G", help="1 turns guidance off")
    method.add_argument("--flow-shift", type=float, metavar="S")
    method.add_argument("--block-size", type=int, metavar="N", help="latents in a block")
    method.add_argument("--blocks-per-pass", type=int, metavar="N", help="blocks that go through the model together")
    method.add_argument("--retire", action=argparse.BooleanOptionalAction, help="read a clean block once more for its "
                        "features")  # fmt: skip
    method.add_argument("--lag", type=int, metavar="N", help="steps that a block is ahead of the next")
    method.add_argument("--seed", type=int, metavar="N", help="chosen and printed if left out")
    method.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N")
    method.add_argument("--dtype", metavar="T", help="float32 or bfloat16")
    method.add_argument("--vae-dtype", metavar="T", help="in which latents are decoded: float32 or bfloat16")
    method.add_argument("--compile", action="store_true", default=None, help="on a GPU: compile what is done to each "
                        "token alone, for faster passes")  # fmt: skip


def _add_output_flags(command: argparse.ArgumentParser) -> None:
    output = command.add_argument_group("output")
    output.add_argument("--output", metavar="F", help="the video, .mp4; F.json is written beside it")
    output.add_argument("--save-latents", metavar="F", help="clean latents, safetensors")
    output.add_argument("--metrics", metavar="F", help="time, memory and hashes, JSON")
    output.add_argument("--contact-sheet", metavar="F", help="a grid of frames with their times, PNG")
    output.add_argument("--trace", metavar="F", help="what each process does when, and what was planned, in "
                        "Chrome's trace format (Perfetto shows it)")  # fmt: skip
    output.add_argument("--overwrite", action="store_true", help="replace files that exist")
    output.add_argument("--dry-run", action="store_true", help="check, print the configuration, make nothing")
    output.add_argument("--quiet", action="store_true", help="no progress, no configuration")
    spread = command.add_argument_group("processes")
    spread.add_argument("--nproc", "--num-gpus", type=int, metavar="N", help="processes, one per GPU (default: 1)")
    _add_degree_flags(spread)
    spread.add_argument("--threads", type=int, metavar="N", help="CPU threads of each process")
    spread.add_argument("--nnodes", type=int, metavar="N", help="machines; start the same command on each")
    spread.add_argument(
        "--node-rank", type=int, metavar="R", help="which of them this is, from 0, which gets the files"
    )
    spread.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where they meet: a free port of machine 0")
    spread.add_argument("--rdzv-timeout", type=int, metavar="S", help="seconds that a machine waits for the others "
                        "(default: 120)")  # fmt: skip
    spread.add_argument("--max-restarts", type=int, metavar="N", help="times that processes which fail go on by "
                        "themselves (default: 0)")  # fmt: skip
    kept = command.add_argument_group("a run that is cut")
    kept.add_argument("--run-dir", metavar="DIR", help="what a run needs to go on (default: NAME.run beside the video; "
                      "removed at the end)")  # fmt: skip
    kept.add_argument(
        "--snapshot-every", type=int, default=8, metavar="N", help="blocks between two snapshots; 0: none"
    )


def _add_degree_flags(group) -> None:
    group.add_argument("--stages", type=int, metavar="S", help="parts of the layers (default: what the cost model "
                       "finds fastest)")  # fmt: skip
    group.add_argument("--sequence-parallel", type=int, metavar="K", help="processes of each stage that share its "
                       "tokens and heads (default: 1 on a CPU, on GPUs what the cost model finds fastest)")  # fmt: skip
    group.add_argument("--cfg-parallel", action=argparse.BooleanOptionalAction, default=None,
                       help="half of the processes for each lane of guidance (default: what the cost model finds "
                       "faster)")  # fmt: skip
    group.add_argument("--parallel-vae", action=argparse.BooleanOptionalAction, default=None,
                       help="decode on two processes, one half behind the other (default: what the cost model finds "
                       "faster)")  # fmt: skip


def _add_grid_flags(plan: argparse.ArgumentParser) -> None:
    grid = plan.add_argument_group("on several processes")
    grid.add_argument("--nproc", "--num-gpus", type=int, metavar="N", help="simulate the plan on so many processes")
    _add_degree_flags(grid)
    grid.add_argument("--calibrate", action="store_true", help="time the model on this machine, for a few seconds")
    grid.add_argument("--layer-ms", type=float, metavar="T", help="a layer's time for a latent (default: 1 unit)")
    grid.add_argument("--decode-ms", type=float, default=0.0, metavar="T", help="the VAE's time for a latent")
    grid.add_argument("--link-ms", type=float, default=0.0, metavar="T", help="a message's latency")
    grid.add_argument("--link-gbps", type=float, metavar="B", help="gigabits per second (default: no limit)")
    grid.add_argument("--chart", metavar="F", help="process against time, coloured by block, PNG")
    grid.add_argument("--threads", type=int, metavar="N", help="CPU threads for --calibrate")


def _add_bench_flags(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("what", nargs="?", choices=["run", "compare", "report", "guard"], default="run",
                       help="run a sweep (default), compare two folders of results, make a page of one, or count what "
                       "fixed small runs do and hold it to the baseline")  # fmt: skip
    bench.add_argument(
        "folders", nargs="*", metavar="DIR", help="compare: the one before and the one after; report: one"
    )
    bench.add_argument("--out", metavar="DIR", help="run: where results.jsonl, table.md, videos and traces go")
    bench.add_argument("--update", action="store_true", help="guard: make the counts of now the baseline")
    bench.add_argument("--baseline", metavar="F", help="guard: the baseline (default: bench/guard.json of the tree)")
    sweep = bench.add_argument_group("the sweep: every combination of these, each separated by commas")
    sweep.add_argument("--model", metavar="M,...", help="model folders (default: tiny-fast)")
    sweep.add_argument("--shape", metavar="NAME,...", help="random weights in place of models, or besides: wan-1.3b, "
                       "wan-14b, small or micro, with a size if another is wanted: wan-1.3b@480x832")  # fmt: skip
    sweep.add_argument("--method", metavar="NAME,...", help="methods (default: the model's)")
    sweep.add_argument("--nproc", metavar="N,...", default="1", help="processes (default: 1)")
    sweep.add_argument("--layout", metavar="L,...", default="fastest", help="what processes share: stages, lanes "
                       "(of guidance), sequence (heads) or fastest")  # fmt: skip
    bench.add_argument("--threads", type=int, metavar="N", help="CPU threads of each process")
    bench.add_argument("--repeats", type=int, default=3, metavar="N", help="measured runs of each case (default: 3)")
    bench.add_argument("--no-warm-up", action="store_true", help="count the first run of each case, too")
    bench.add_argument("--generate", metavar="FLAGS", default="--seconds 10 --seed 0",
                       help="flags of generate for all cases (default: %(default)s)")  # fmt: skip


def _add_train_flags(train: argparse.ArgumentParser) -> None:
    train.add_argument("part", choices=["vae", "decoder", "text", "latents", "dit", "pack", "distill"],
                       help="in this order; decoder goes on with that of the VAE alone, latents encodes films once, "
                       "pack writes the model folder, distill makes one of few steps from a model folder")  # fmt: skip
    train.add_argument("--out", metavar="DIR", required=True, help="the training folder, the same for all parts")
    train.add_argument("--steps", type=int, metavar="N", help="training steps (latents: films of each set, at most)")
    train.add_argument("--batch-size", type=int, metavar="N", help="clips of a step, of all processes together")
    train.add_argument("--learning-rate", type=float, metavar="R")
    train.add_argument("--seed", type=int, default=0, metavar="N")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    train.add_argument("--model", metavar="DIR", help="pack: the model folder to write; dit with --data, distill: the "
                       "folder or hub id to start from (default: tiny); latents: whose VAE encodes films")  # fmt: skip
    train.add_argument("--threads", type=int, metavar="N")
    _add_step_flags(train.add_argument_group("steps"))
    spread = train.add_argument_group("processes (torchrun starts them, too)")
    spread.add_argument("--nproc", "--num-gpus", type=int, metavar="N", help="vae, dit: processes, which share each "
                        "batch (default: 1)")  # fmt: skip
    spread.add_argument("--deepspeed", metavar="Z", help="vae, dit: zero1, zero2, zero3 or a DeepSpeed file, which may "
                        'say "auto"; optimizer: AdamW, since ZeRO cuts the matrices that Muon needs')  # fmt: skip
    looks = train.add_argument_group("looks")
    looks.add_argument("--validate-every", type=int, default=0, metavar="N", help="dit: steps between two losses on "
                       "films held out (default: none)")  # fmt: skip
    looks.add_argument("--sample-every", type=int, default=0, metavar="N", help="dit: steps between two contact sheets "
                       "of videos it makes (default: none)")  # fmt: skip
    looks.add_argument("--tensorboard", action="store_true", default=None, help="curves beside log.jsonl")
    _add_objective_flags(train.add_argument_group("dit: levels and loss"))
    distil = train.add_argument_group("distill")
    distil.add_argument("--method", metavar="M", help="how the student will be used (default: rolling-fast); dit with "
                        "--teacher-guidance, too (default: as before)")  # fmt: skip
    distil.add_argument("--prompts-file", metavar="F", help="what to make videos of, a prompt a line (default, for a "
                        "model of procedural films: captions of such)")  # fmt: skip
    distil.add_argument("--teacher-guidance", type=float, metavar="G", help="distill: what guidance the teacher has "
                        "(default: 3); dit with --data: learn to say in one forward what the model says with that "
                        "guidance (default: learn from the data)")  # fmt: skip
    distil.add_argument("--student", metavar="M", help="what the student begins as, such as a model that has learned "
                        "guidance (default: the teacher)")  # fmt: skip
    distil.add_argument("--student-speed", type=float, metavar="S", help="of the learning rate, which is the critic's "
                        "(default: 0.2)")  # fmt: skip
    distil.add_argument("--critic-draws", type=int, metavar="K", help="levels at which the critic sees each video "
                        "(default: 2)")  # fmt: skip
    videos = train.add_argument_group("dit: training a model on, on videos")
    videos.add_argument("--data", metavar="DIR", help="a folder of videos with captions.jsonl, or the latents of "
                        "films, DIR/latents of the training folder")  # fmt: skip
    videos.add_argument("--lora", type=int, metavar="R", help="train adapters of this rank, not the model")
    videos.add_argument("--height", type=int, metavar="N", help="pixels; videos are scaled and cut to it, turned, or a "
                        "square of that area (default: the model's)")  # fmt: skip
    videos.add_argument("--width", type=int, metavar="N", help="pixels (default: the model's)")
    videos.add_argument("--fps", type=int, metavar="N", help="(default: the model's)")
    videos.add_argument("--num-frames", type=int, metavar="N", help="of a clip, 12n + 1 (default: 61)")
    videos.add_argument("--clips-per-video", type=int, metavar="N", help="at random places (default: 4)")
    videos.add_argument("--max-broken", type=float, metavar="SHARE", help="of videos that may be unusable (default: "
                        "0.1)")  # fmt: skip


def _add_data_flags(data: argparse.ArgumentParser) -> None:
    data.add_argument("what", choices=["make"], help="make: write films and their captions.jsonl")
    data.add_argument("--out", metavar="DIR", required=True)
    data.add_argument("--films", type=int, required=True, metavar="N", help="how many")
    data.add_argument("--num-frames", type=int, default=161, metavar="N", help="of each, 4n + 1 (default: 161)")
    data.add_argument("--fps", type=int, default=16, metavar="N", help="(default: 16)")
    data.add_argument("--height", type=int, default=128, metavar="N", help="pixels (default: 128)")
    data.add_argument("--width", type=int, default=128, metavar="N", help="pixels (default: 128)")
    data.add_argument("--seed", type=int, default=0, metavar="N")


def _add_lora_flags(lora: argparse.ArgumentParser) -> None:
    lora.add_argument("what", choices=["merge"], help="merge: write a model folder with the LoRA in its weights")
    lora.add_argument("--model", metavar="M", help="a model folder or a hub id (default: tiny)")
    lora.add_argument("--lora", metavar="F", required=True, help="the LoRA, as longvid, diffusers and peft write it")
    lora.add_argument("--scale", type=float, default=1.0, metavar="S", help="how much of it (default: 1)")
    lora.add_argument("--out", metavar="DIR", required=True, help="the model folder to write")
    lora.add_argument("--threads", type=int, metavar="N")


def _add_step_flags(steps) -> None:
    steps.add_argument("--optimizer", choices=["muon", "adamw"], help="muon: with AdamW for what is no matrix "
                       "(default: muon; with --deepspeed adamw)")  # fmt: skip
    steps.add_argument("--lr-scheduler", choices=["cosine", "constant"], help="after the warm-up (default: cosine)")
    steps.add_argument("--lr-warmup-steps", type=int, metavar="N", help="(default: 100)")
    steps.add_argument("--gradient-accumulation-steps", type=int, metavar="K", help="parts in which a process takes "
                       "its share of a batch (default: 1)")  # fmt: skip
    steps.add_argument("--max-grad-norm", type=float, metavar="G", help="gradients are clipped to it (default: 1)")
    steps.add_argument("--ema-decay", type=float, metavar="D", help="of the averaged weights, which are what is saved; "
                       "0: the last ones (default: 0.999)")  # fmt: skip
    steps.add_argument("--save-every", type=int, metavar="N", help="steps between two checkpoints (default: 500)")
    steps.add_argument("--log-every", type=int, metavar="N", help="steps between two records (default: 50)")
    steps.add_argument("--dtype", choices=["float32", "bfloat16"], help="vae, dit: of products; weights are float32 "
                       "(default: bfloat16)")  # fmt: skip
    steps.add_argument("--device", metavar="D", help="vae, dit: cpu or cuda (default: cpu)")
    steps.add_argument("--gradient-checkpointing", action="store_true", default=None, help="dit: keep layers' inputs "
                       "only and compute them again for gradients")  # fmt: skip
    steps.add_argument("--compile", action="store_true", default=None, help="dit: compile its layers for faster steps")


def _add_objective_flags(dit) -> None:
    dit.add_argument("--levels", choices=["sync", "iid", "fopp", "anchored-fopp", "staircase"],
                     help="how a clip's blocks get levels (default: staircase, 3 in 10 batches iid)")  # fmt: skip
    dit.add_argument("--picture-share", type=float, metavar="P", help="share of the batches that are first frames "
                     "alone (default: falls from 1 to 0.2; with --data 0.2)")  # fmt: skip
    dit.add_argument("--opening-share", type=float, metavar="P", help="of the others, share of those that are a "
                     "first block and the next (default: 0.5)")  # fmt: skip
    dit.add_argument("--loss-weighting", choices=["none", "min-snr"], help="(default: none)")
    dit.add_argument("--multitask", choices=["none", "uw", "pcgrad", "nash"],
                     help="intervals of levels as tasks, and how they are combined (default: none)")  # fmt: skip
    dit.add_argument("--num-intervals", type=int, metavar="N", help="how many intervals (default: 5)")
    dit.add_argument("--interval-cost", choices=["timestep", "log-snr", "affinity"],
                     help="what clusters them; affinity is measured on gradients (default: log-snr)")  # fmt: skip
    dit.add_argument("--immiscible", action="store_true", default=None, help="assign a batch's noise to its clips")
    dit.add_argument("--balance-first", action="store_true", default=None,
                     help="weight a video's first latent, which is one frame, to the others' scale")  # fmt: skip


def _add_evaluate_flags(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("videos", nargs="?", metavar="VIDEOS", help="a folder of videos, or a video")
    evaluate.add_argument("--prompts", metavar="F", help="make videos first: a text file with a prompt a line, or "
                          "held-out, 32 prompts of worlds that were not trained on; with the flags below")  # fmt: skip
    evaluate.add_argument("--num-prompts", type=int, metavar="N", help="only the first so many")
    evaluate.add_argument("--out", metavar="DIR", required=True, help="where evaluation.json, seconds.csv, curves.png "
                          "and the videos made go")  # fmt: skip
    evaluate.add_argument("--no-frechet", action="store_true", help="leave out the distance to true films")
    evaluate.add_argument("--overwrite", action="store_true", help="replace files that exist")
    evaluate.add_argument("--quiet", action="store_true", help="no progress")
    evaluate.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    _add_video_flags(evaluate)
