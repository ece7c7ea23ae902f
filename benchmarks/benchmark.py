"""Compare mnist.py with the recipe of the PyTorch examples (baseline.py) on this machine, and print a Markdown table.

    python benchmarks/benchmark.py --data DIR --seeds 1 2 3 --baselines 1     each until it has 99 % (at most 14 epochs)
    python benchmarks/benchmark.py --data DIR --seeds 1 2 3 --baselines 0 --epochs 5                      mnist.py only
    python benchmarks/benchmark.py --data DIR --cuda                                                         on the GPU

mnist.py trains for one epoch, in the native precision and in float32. The programs take turns, each in a process of its
own and with the same number of threads, so that whatever else the machine does meets both. The table gives the least
of the seconds, which other load disturbs least. Seconds are those of training, without tests and imports.
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

import torch  # noqa: E402

from mnist import TrainingError, find_file, load  # noqa: E402
from mnist import precision as native  # noqa: E402

# What makes mnist.py compute in float32 everywhere.
FLOAT32 = {'natively, else float32."""': 'natively, else float32."""\n    return torch.float32'}
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
    command, environment = list(map(str, command)), {**os.environ, "OMP_NUM_THREADS": str(threads)}
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


def machine():
    """Return the date, the processor, the GPU if there is one, and the version that a table needs beside it."""
    cores, version = len(os.sched_getaffinity(0)), importlib.metadata.version("torch")
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{date.today()}, {processor()}, {cores} cores, {gpu}torch {version}"


def variant(folder, name, replacements):
    """Write mnist.py with texts replaced, each of which must be in it once, as another file; return its path."""
    text = (HERE.parent / "mnist.py").read_text()
    for old, new in replacements.items():
        if text.count(old) != 1:
            sys.exit(f"{old!r} is {text.count(old)} times in mnist.py, not once: change the benchmark with it")
        text = text.replace(old, new)
    path = folder / name
    path.write_text(text)
    return path


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
        required="MNIST_DIR" not in os.environ,
        help="folder of the four MNIST files, gzipped or not (default: the variable MNIST_DIR)",
    )
    parser.add_argument(
        "--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of each program; default: all cores"
    )
    return parser


def training_seconds(text):
    """Return the seconds that mnist.py says it has trained."""
    return float(re.search(r"^Trained in (.*) s,", text, re.M)[1])


def accuracies(text):
    """Return the accuracies (0..1) in a program's log, one for each epoch."""
    return [float(value) for value in re.findall(r"\baccuracy=(\S+)", text)]


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=positive, default=1, help="of mnist.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--baselines", type=int, default=1, metavar="N", help="run the baseline for the first N seeds")
    parser.add_argument("--until", type=float, default=0.99, help="test accuracy at which the baseline may stop")
    parser.add_argument("--cuda", action="store_true", help="train on the GPU; default: on the CPU")
    args = parser.parse_args()
    if args.cuda and not torch.cuda.is_available():
        parser.error("--cuda: PyTorch finds no GPU here")

    with tempfile.TemporaryDirectory() as folder:
        try:
            unpack(args.data, Path(folder, "MNIST", "raw"))
        except TrainingError as error:
            parser.error(f"--data: {error}")
        where = [] if args.cuda else ["--no-cuda"]
        baseline = [HERE / "baseline.py", *where, "--epochs", 14, "--until", args.until]
        programs = {"baseline.py, float32": baseline}
        for precision in "bfloat16", "float32":
            if precision == "float32" or native(torch.device("cuda" if args.cuda else "cpu")) == torch.bfloat16:
                replaced = {} if precision == "bfloat16" else FLOAT32
                program = variant(Path(folder), f"{precision}.py", replaced)
                programs[f"mnist.py, {precision}"] = [program, *where, "--epochs", args.epochs]
        results = {name: [] for name in programs}
        for number, seed in enumerate(args.seeds):
            for name, program in programs.items():
                if program == baseline and number >= args.baselines:
                    continue
                text, memory = run([sys.executable, *program, "--data", folder, "--seed", seed], args.threads)
                if program == baseline:
                    seconds = min(map(float, re.findall(r"^seconds=(.*)", text, re.M)))
                else:
                    seconds = training_seconds(text) / args.epochs
                results[name].append((seconds, accuracies(text), memory))
                reached = " ".join(f"{accuracy:.2%}" for accuracy in accuracies(text))
                print(f"{name}: seed {seed}, {seconds:.1f} s an epoch, {reached}, {memory:.0f} MB", flush=True)

    print(f"\n{machine()}, threads: {args.threads}\n")
    print("| program | epochs | s per epoch (least) | s in all | ratio | accuracy, mean (least) | runs | peak MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    slowest = None
    for name, runs in results.items():
        if runs:
            seconds, accuracy, memory = zip(*runs)
            epochs, last = min(map(len, accuracy)), [values[-1] for values in accuracy]
            total = epochs * min(seconds)
            slowest = slowest or total
            print(
                f"| {name} | {epochs} | {min(seconds):.1f} | {total:.1f} | {slowest / total:.1f} "
                f"| {mean(last):.2%} ({min(last):.2%}) | {len(runs)} | {max(memory):.0f} |"
            )


if __name__ == "__main__":
    main()
