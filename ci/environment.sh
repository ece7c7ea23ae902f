# Sourced by the scripts beside it: finds a Python, lets environment.py make .venv where it is not yet made, and puts
# .venv first on PATH. The Python is the first of python3, python3.13, ..., python3.10 on PATH that is 3.10 or newer;
# PYTHON=/path/to/python names another.
# Afterwards: $project is the project's folder, $python the Python of .venv.
set -euo pipefail

project=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

# The user's own packages and kernels must not stand in for one that is missing in .venv.
unset PYTHONPATH PYTHONHOME JUPYTER_PATH
export PYTHONNOUSERSITE=1 JUPYTER_PREFER_ENV_PATH=1
# uv leaves the compiling of modules to their first import; without keeping the result every import of torch is slow.
unset PYTHONDONTWRITEBYTECODE
# The scripts and the page work in other folders than the caller.
case ${MNIST_DIR:-/} in /*) ;; *) export MNIST_DIR=$PWD/$MNIST_DIR ;; esac

# Prints the interpreter itself: not a pyenv shim, and not a Python of the .venv that may have to be made anew.
probe='import sys; print(getattr(sys, "_base_executable", sys.executable)); sys.exit(sys.version_info < (3, 10))'
find_python() {
    for candidate; do
        python=$("$candidate" -c "$probe" 2>/dev/null) && return
    done
    return 1
}
if [ -n "${PYTHON:-}" ]; then
    if ! find_python "$PYTHON"; then
        echo "error: PYTHON=$PYTHON is not a Python 3.10 or newer ($("$PYTHON" --version 2>&1 | tail -n 1))." \
            "Name another, or none to take the python3 on PATH." >&2
        exit 1
    fi
elif ! find_python python3 python3.13 python3.12 python3.11 python3.10; then
    echo "error: no Python 3.10 or newer on PATH (python3 there: $(python3 --version 2>&1 | tail -n 1))." \
        "Install one, or name it: PYTHON=/path/to/python $0" >&2
    exit 1
fi

"$python" "$project/ci/environment.py"
python=$project/.venv/bin/python
export VIRTUAL_ENV="$project/.venv" PATH="$project/.venv/bin:$PATH"
