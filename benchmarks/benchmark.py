"""Compare mnist.py with the recipe of the PyTorch examples (baseline.py) on this machine, and print a Markdown table.

    MNIST_DIR=... python benchmarks/benchmark.py                             one epoch of each
    python benchmarks/benchmark.py --data DIR --seeds 1 2 3 --baselines 2    more runs of one epoch
    python benchmarks/benchmark.py --data DIR --epochs 5 --baselines 0       mnist.py only
    python benchmarks/benchmark.py --data DIR --processes 2                  also mnist.py under torchrun

The programs take turns, each in a process of its own and with the same number of threads, so that whatever else the
machine does meets both. The tables give the least of the seconds, which other load disturbs least.
"""

import argparse
import gzip
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import mean

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from mnist import TrainingError, find_file, load  # noqa: E402

FILES = [f"{split}-{what}-ubyte" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]


def unpack(source, target):
    """Write the four MNIST files of a folder, gzipped or not, unpacked into another; raise TrainingError if damaged."""
    target.mkdir(parents=True)
    for split in "train", "t10k":
        load(source, split)
    for name in FILES:
        path = find_file(source, name)
        (target / name).write_bytes(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())


def run(command, threads):
    """Run a program; return its output and its peak of resident memory in MB (of the largest of its processes)."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)  # not process.wait(): that does not tell the memory
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{text}")
    return text, usage.ru_maxrss / 1024


def processor():
    """Return the name of the processor."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def make_parser(description):
    """Return a parser of a benchmark's arguments, with --data."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data",
        default=os.environ.get("MNIST_DIR"),
        metavar="DIR",
        help="folder of the four MNIST files, gzipped or not (default: the variable MNIST_DIR)",
    )
    return parser


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=positive, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--baselines", type=int, default=1, metavar="N", help="run the baseline for the first N seeds")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="also run mnist.py as N processes that share the threads"
    )
    args = parser.parse_args()
    if not args.data:
        parser.error("--data DIR or the variable MNIST_DIR must give the folder of the four MNIST files")
    if args.processes and args.threads % args.processes:
        parser.error(f"--processes {args.processes} cannot share --threads {args.threads} evenly")

    with tempfile.TemporaryDirectory() as folder:
        try:
            unpack(args.data, Path(folder, "MNIST", "raw"))
        except TrainingError as error:
            parser.error(f"--data: {error}")
        common = ["--data", folder, "--epochs", str(args.epochs)]
        trainer = [str(HERE.parent / "mnist.py"), "--no-cuda", *common]
        programs = {
            "baseline.py": ([sys.executable, str(HERE / "baseline.py"), *common], args.threads, 1),
            "mnist.py": ([sys.executable, *trainer], args.threads, 1),
        }
        if args.processes:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            torchrun += ["--nproc-per-node", str(args.processes), *trainer]
            programs["mnist.py, torchrun"] = (torchrun, args.threads // args.processes, args.processes)
        results = {name: [] for name in programs}
        precision = "float32"
        for number, seed in enumerate(args.seeds):
            for name, (command, threads, _) in programs.items():
                if name == "baseline.py" and number >= args.baselines:
                    continue
                text, memory = run([*command, "--seed", str(seed)], threads)
                accuracy = float(re.findall(r"^accuracy=(.*)", text, re.M)[-1])
                if name == "baseline.py":
                    seconds = min(map(float, re.findall(r"^seconds=(.*)", text, re.M)))
                else:
                    seconds = float(re.search(r"^Trained in (.*) s,", text, re.M)[1]) / args.epochs
                    precision = re.search(r" x cpu in torch\.(\w+)$", text, re.M)[1]
                results[name].append((seconds, accuracy, memory))
                print(
                    f"{name}: seed {seed}, {seconds:.1f} s an epoch, accuracy {accuracy:.2%}, {memory:.0f} MB",
                    flush=True,
                )

    print(
        f"\n{date.today()}, {processor()}, {len(os.sched_getaffinity(0))} cores, "
        f"torch {importlib.metadata.version('torch')}, epochs: {args.epochs}; "
        f"baseline.py computes in float32, mnist.py in {precision}\n"
    )
    print(
        "| program | processes x threads | training, s per epoch (least) | ratio | test accuracy (mean) | runs "
        "| peak memory, MB |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    results = {name: list(zip(*runs)) for name, runs in results.items() if runs}
    slowest = min(results.get("baseline.py", results["mnist.py"])[0])
    for name, (seconds, accuracies, memory) in results.items():
        ratio = f"{slowest / min(seconds):.1f}" if "baseline.py" in results else "-"
        print(
            f"| {name} | {programs[name][2]} x {programs[name][1]} | {min(seconds):.1f} | {ratio} "
            f"| {mean(accuracies):.2%} | {len(seconds)} | {max(memory):.0f} |"
        )


if __name__ == "__main__":
    main()
