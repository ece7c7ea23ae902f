"""Compare autoencoder.py with Lightning in the way of most tutorials (naive_autoencoder.py); print a Markdown table.

    MNIST_DIR=... python benchmarks/benchmark_autoencoder.py          one epoch of each
    python benchmarks/benchmark_autoencoder.py --data DIR --runs 3    three times, with the seeds 1, 2 and 3

As in benchmark.py, the programs take turns, each in a process of its own and with the same number of threads, and the
table gives the least of the seconds, which other load disturbs least. An epoch contains the validation after it.
"""

import importlib.metadata
import os
import re
import sys
import tempfile
from pathlib import Path
from statistics import mean

from benchmark import HERE, machine, make_parser, positive, run, unpack

from mnist import TrainingError, load  # benchmark has put its folder on the path

NAIVE, TRAINER = HERE / "naive_autoencoder.py", HERE.parent / "autoencoder.py"
PROGRAMS = (NAIVE, 32), (NAIVE, 64), (TRAINER, 64)  # with batch sizes: half as many steps are faster by themselves


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=positive, default=1)
    parser.add_argument("--runs", type=positive, default=1, help="of each program")
    parser.set_defaults(threads=1)  # more only wait for each other in so small a network
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        try:
            unpack(args.data, Path(folder, "MNIST", "raw"))
            images = len(load(args.data, "train")[0])
        except TrainingError as error:
            parser.error(f"--data: {error}")
        os.environ.update(
            {f"WANDB_{what}_DIR": folder for what in ("CACHE", "CONFIG", "DATA")},
            DO_NOT_TRACK="1",
            WANDB_MODE="offline",
            WANDB_ERROR_REPORTING="false",
        )
        results = {program: [] for program in PROGRAMS}
        for seed in range(1, args.runs + 1):
            for program, batch_size in PROGRAMS:
                command = [
                    sys.executable,
                    program,
                    "--data",
                    folder,
                    "--epochs",
                    args.epochs,
                    "--batch-size",
                    batch_size,
                    "--seed",
                    seed,
                ]
                if program == TRAINER:
                    command += ["--accelerator", "cpu", "--results", Path(folder, f"results-{seed}")]
                text, memory = run(command, args.threads)
                if program == TRAINER:
                    seconds, speed = map(float, re.search(r"^Trained in (.*) s, (.*) images/s$", text, re.M).groups())
                    seconds /= args.epochs
                else:
                    seconds = mean(map(float, re.findall(r"^seconds=(.*)", text, re.M)))
                    speed = (images - images // 12) / seconds
                loss = float(re.findall(r"^val_loss=(.*)", text, re.M)[-1])
                results[program, batch_size].append((seconds, speed, loss, memory))
                print(
                    f"{program.name}, batches of {batch_size}: seed {seed}, {seconds:.1f} s an epoch, "
                    f"{speed:.0f} images/s, error {loss:.4f}, {memory:.0f} MB",
                    flush=True,
                )

    print(
        f"\n{machine()}, threads: {args.threads}, "
        f"lightning {importlib.metadata.version('lightning')}, epochs: {args.epochs}\n"
    )
    print(
        "| program | batch size | s per epoch (least) | images/s | ratio | validation error (mean) | runs "
        "| peak memory, MB |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    slowest = max(speed for _, speed, _, _ in results[PROGRAMS[0]])
    for (program, batch_size), runs in results.items():
        seconds, speeds, losses, memory = zip(*runs)
        print(
            f"| {program.name} | {batch_size} | {min(seconds):.1f} | {max(speeds):.0f} | {max(speeds) / slowest:.1f} "
            f"| {mean(losses):.4f} | {len(runs)} | {max(memory):.0f} |"
        )


if __name__ == "__main__":
    main()
