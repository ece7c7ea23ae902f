"""Makes .venv, the environment that requirements.txt locks, unless it is there already.

    python3 ci/environment.py            make it (what environment.sh does)
    python3 ci/environment.py uv ARG...  run the environment's uv with the package index that pip is configured for

Only the standard library of Python 3.10 is at hand here.
"""

import ast
import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
LOCK = PROJECT / "requirements.txt"
VENV = PROJECT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "made-from.txt"
GIGABYTES = 7 if sys.platform == "linux" else 2  # of a new environment; on Linux torch brings CUDA's libraries

# A silent index is given up after three tries of this many seconds.
TIMEOUT = 15
PIP = ["-m", "pip", "--no-input", "--disable-pip-version-check", "--timeout", str(TIMEOUT), "--retries", "2"]
PIP_INSTALL = [*PIP, "install", "--quiet", "--no-deps", "--require-hashes", "-r"]

# The lines of an installer that tell of its progress.
PROGRESS = r"\s*(Resolved|Downloading|Downloaded|Building|Built|Prepared|Installed) |WARNING: Retrying"

# What an installer says when it fails, the cause, and the way out.
FAILURES = [
    (r"No space left on device|Errno 28\b|os error 28\b|[Dd]isk quota exceeded",
     "a disk is full",
     f"A new environment needs {GIGABYTES} GB in the project's folder, or in uv's cache (UV_CACHE_DIR) and there."),
    (r"DO NOT MATCH THE HASHES|Hash mismatch",
     "the package index served a file other than the one that requirements.txt names by its hash",
     "It was not installed. Run the command again; if that does not help, use another index (PIP_INDEX_URL)."),
    (r"CERTIFICATE_VERIFY_FAILED|[Cc]ertificate",
     "the certificate of the package index is not trusted",
     "Name the file with your network's certificates: PIP_CERT=/path/to/certificates.pem"),
    (r"\b40[137]\b|too many 5\d\d error responses|HTTP status",
     "the package index refuses to answer",
     "Check the address and the password in PIP_INDEX_URL or in pip's configuration."),
    (r"Retrying|timed out|error sending request|Failed to fetch|[Cc]onnection|resolve host|dns error",
     "the package index does not answer",
     "Check the network, or name an index that can be reached: PIP_INDEX_URL=https://..."),
    (r"No matching distribution|not found in the package registry|no version of|no wheels with a matching",
     f"the package index has no such package for Python {platform.python_version()} on {platform.machine()}",
     "Check the index (PIP_INDEX_URL), or name another Python: PYTHON=/path/to/python"),
]


def say(text):
    print(text, file=sys.stderr, flush=True)


def fail(text):
    sys.exit(f"error: {text}")


def stamp():
    """What the environment depends on. The folder is part of it: scripts in .venv hold its path and break by a move."""
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    return f"requirements.txt {digest}\nPython {platform.python_version()}\nfolder {PROJECT}\n".encode(errors="replace")


def is_made():
    return STAMP.is_file() and PYTHON.exists() and STAMP.read_bytes() == stamp()


def run(command, environment=None):
    """Runs an installer, shows those of its lines that tell of progress, returns its exit status and all it said."""
    lines = []
    # The file that locks the environment stays open in the child: should this process be killed, the next one waits
    # for the child's end.
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace", env=environment, cwd=PROJECT, close_fds=False) as process:
        try:
            for line in process.stdout:
                lines.append(line)
                if re.match(PROGRESS, line):
                    say("  " + line.strip()[:110])
        except BaseException:
            process.kill()
            raise
    return process.returncode, "".join(lines)


def explain(what, output):
    """Ends with one message about an installer that failed."""
    for pattern, cause, way_out in FAILURES:
        if re.search(pattern, output):
            said = next(line.strip() for line in output.splitlines() if re.search(pattern, line))
            fail(f"could not {what}: {cause}.\n{way_out}\nThe installer said: {said[:400]}")
    fail(f"could not {what}. The installer said:\n" + "\n".join(output.strip().splitlines()[-10:]))


def uv_environment():
    """uv does not read pip's configuration: this tells it the same index, proxy and certificates."""
    listing = subprocess.run([PYTHON, *PIP, "config", "list"], stdout=subprocess.PIPE, text=True, check=True).stdout
    pip = {}
    for section in ("global", "install", ":env:"):  # in pip's order: the later wins
        for name, value in re.findall(rf"^{section}\.([\w-]+)=(.*)$", listing, re.MULTILINE):
            pip[name] = " ".join(ast.literal_eval(value).split()) or pip.get(name)
    certificates = pip.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    environment = dict(os.environ)
    for value, name, *others in [
        (pip.get("index-url"), "UV_DEFAULT_INDEX", "UV_INDEX_URL"),
        (pip.get("extra-index-url"), "UV_INDEX", "UV_EXTRA_INDEX_URL"),
        (pip.get("trusted-host"), "UV_INSECURE_HOST"),
        (pip.get("proxy"), "ALL_PROXY", "all_proxy"),
        (certificates, "SSL_CERT_FILE", "SSL_CERT_DIR", "UV_SYSTEM_CERTS"),
        (str(TIMEOUT), "UV_HTTP_TIMEOUT"),
        ("2", "UV_HTTP_RETRIES"),
    ]:
        if value and not any(os.environ.get(known) for known in (name, *others)):
            environment[name] = value
    return environment


def install():
    """Installs the lock by uv, which takes seconds where pip takes minutes, and by pip where there is no uv."""
    os.environ["PIP_USER"] = "0"  # some notebook servers set it; in an environment it is an error
    pinned_uv = re.search(r"^uv==(.*\n(?: .*\n)*)", LOCK.read_text(), re.MULTILINE)
    if pinned_uv:
        only_uv = VENV / "uv.txt"
        only_uv.write_text(pinned_uv[0])
        status, said = run([PYTHON, *PIP_INSTALL, only_uv, "--only-binary", ":all:"])
        if status == 0:
            # As with pip, a package may come from any of the indexes: its version and hashes are fixed.
            command = ["pip", "install", "--index-strategy", "unsafe-best-match", "--no-deps", "--require-hashes"]
            status, said = run([VENV / "bin" / "uv", *command, "--python", PYTHON, "-r", LOCK], uv_environment())
            if status:
                explain("install the packages of requirements.txt", said)
            return
        if "No matching distribution" not in said or "Retrying" in said:
            explain("get the installer uv", said)
    say("  There is no uv for this machine; pip takes several minutes.")
    status, said = run([PYTHON, *PIP_INSTALL, LOCK])
    if status:
        explain("install the packages of requirements.txt", said)


def make():
    for module in ("venv", "ensurepip"):
        try:
            __import__(module)
        except ImportError:
            fail(f"{sys.executable} (Python {platform.python_version()}) cannot make a virtual environment: its module "
                 f"{module} is missing.\nDebian and Ubuntu: apt install python3-venv. Or name another Python: "
                 "PYTHON=/path/to/python")
    if VENV.exists():
        say("The environment .venv was made from another requirements.txt, Python or folder, or not to its end.")
        shutil.rmtree(VENV)
    free = shutil.disk_usage(PROJECT).free / 1e9
    if free < GIGABYTES:
        fail(f"the environment needs {GIGABYTES} GB, and {PROJECT} has {free:.1f} GB left.\n"
             "Free some, or move the project to a larger disk.")
    say(f"Making the environment .venv with Python {platform.python_version()}. That takes about a minute, "
        "longer where the network is slow.")
    try:
        status, said = run([sys.executable, "-m", "venv", VENV])
        if status:
            explain("make a virtual environment", said)
        install()
        unfinished = VENV / "stamp"
        unfinished.write_bytes(stamp())
        unfinished.rename(STAMP)
    except BaseException:
        shutil.rmtree(VENV, ignore_errors=True)
        raise
    say("The environment is ready.")


def main():
    if is_made():
        return
    # Two runs at once: the second waits, and finds the environment made.
    (PROJECT / "build").mkdir(exist_ok=True)
    with open(PROJECT / "build" / "environment.lock", "w") as file:
        os.set_inheritable(file.fileno(), True)  # see run()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another run is making the environment. Waiting for its end.")
            fcntl.flock(file, fcntl.LOCK_EX)
        if not is_made():
            make()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that make() cleans up
    try:
        if sys.argv[1:2] == ["uv"]:
            os.execve(VENV / "bin" / "uv", sys.argv[1:], uv_environment())
        main()
    except OSError as error:
        fail(f"could not make the environment {VENV}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
