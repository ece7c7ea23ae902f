"""Measure how long a changed trainer takes to be in a registry as an image: by Fairing, and by the Dockerfile.

    ci/cluster/with .venv/bin/python benchmarks/image.py

needs a registry with the base image (ci/cluster brings both), and buildah for the comparison; prints a Markdown table.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

from benchmark import processor  # noqa: E402
from support.digits import get_digits  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--image",
        default=f"{os.environ.get('TUTORIAL_CLUSTER', 'localhost:5000')}/tutorial/mnist",
        help="registry and name, without a tag; default: %(default)s",
    )
    parser.add_argument("--builds", type=int, default=5, help="of which the least seconds count; default: %(default)s")
    args = parser.parse_args()

    started = time.perf_counter()
    from support.fairing_compat import Builder, Files

    imported = time.perf_counter() - started
    digits = get_digits()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Path(folder, "mnist.py")
        shutil.copy(ROOT / "mnist.py", trainer)
        shutil.copy(ROOT / "Dockerfile", folder)
        Path(folder, "data").mkdir()
        for path in digits.files:
            shutil.copy(path, Path(folder, "data"))
        files = {trainer: "/app/mnist.py"} | {path: f"/app/data/{path.name}" for path in digits.files}

        def edit():
            with trainer.open("a") as file:
                file.write(f"# {time.time_ns()}\n")

        def fairing():
            Builder(f"{args.image}:benchmark", f"{args.image}:base", Files(files, ["python", "/app/mnist.py"])).build()

        buildah = ["buildah", "--root", f"{folder}/root", "--runroot", f"{folder}/run", "--storage-driver", "overlay"]

        def dockerfile():
            image = f"{args.image}:dockerfile"
            arguments = ["--build-arg", f"BASE={args.image}:base", "--build-arg", "DATA=data", "-t", image, folder]
            build = ["build", "--isolation", "chroot", "--tls-verify=false", "--layers", *arguments]
            push = ["push", "--tls-verify=false", "--disable-compression", image]
            for command in build, push:
                subprocess.run([*buildah, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def seconds(build):
            edit()
            started = time.perf_counter()
            build()
            return time.perf_counter() - started

        first, first_dockerfile = seconds(fairing), seconds(dockerfile)
        again = min(seconds(fairing) for _ in range(args.builds))
        again_dockerfile = min(seconds(dockerfile) for _ in range(args.builds))
        subprocess.run([*buildah, "rmi", "--all", "--force"], stdout=subprocess.DEVNULL, check=True)

    print(f"{date.today()}, {processor()}, {os.cpu_count()} cores; import of Fairing: {imported:.1f} s\n")
    print("| | first build, s | after an edit of mnist.py, s (least) | ratio |\n| --- | --- | --- | --- |")
    print(f"| Fairing | {first:.2f} | {again:.2f} | 1.0 |")
    print(f"| Dockerfile, buildah | {first_dockerfile:.2f} | {again_dockerfile:.2f} | {again_dockerfile / again:.1f} |")


if __name__ == "__main__":
    main()
