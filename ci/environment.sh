# Sourced by the scripts beside it: makes .venv hold what requirements.txt locks, and puts .venv first on PATH.
# PYTHON=/path/to/python names the Python to make it with. Afterwards: $project, the project's folder; $python, .venv's.
set -euo pipefail
project=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$project/.venv python=$project/.venv/bin/python

# Nothing of the user's may stand in for what is in .venv. Compiled modules are kept, as uv compiles none itself.
unset PYTHONPATH PYTHONHOME JUPYTER_PATH PYTHONDONTWRITEBYTECODE MPLBACKEND
export PYTHONNOUSERSITE=1 JUPYTER_PREFER_ENV_PATH=1 PIP_USER=0 GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000} # benchmarks/README.md
case ${MNIST_DIR:-/} in # the scripts and the page work in other folders than the caller
    \~ | \~/*) MNIST_DIR=$HOME${MNIST_DIR#\~} ;;
    [!/]*) MNIST_DIR=$PWD/$MNIST_DIR ;;
esac

uv() ( # .venv's uv with the package index that pip is told of, as uv does not read pip's settings
    pip=$("$python" -m pip config list)
    setting() { sed -nE "s/^(global|install)\.$1='(\\\\n)?(.*)'\$/\3/p" <<< "$pip" | sed 's/\\n/ /g' | tail -n 1; }
    export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-${PIP_INDEX_URL:-$(setting index-url)}}}
    export UV_INDEX=${UV_INDEX:-${UV_EXTRA_INDEX_URL:-${PIP_EXTRA_INDEX_URL:-$(setting extra-index-url)}}}
    export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-15} UV_HTTP_RETRIES=${UV_HTTP_RETRIES:-2}
    exec "$venv/bin/uv" "$@"
)
fail() { echo "error: $1" >&2 && exit 1; }
stamp() { echo "$project, $("${PYTHON:-$python}" -VV 2>&1)"; } # in a file since the last complete installation
is_usable() { [ -x "$venv/bin/uv" ] && [ "$(cat "$venv/stamp" 2>&1)" = "$(stamp)" ]; }
sync=(pip sync --require-hashes --index-strategy unsafe-best-match --python "$python" "$project/requirements.txt")
is_complete() { is_usable && "$venv/bin/uv" "${sync[@]}" --check --offline --quiet 2> /dev/null; }
install() {
    if ! is_usable; then
        echo "Making the environment .venv. That takes about a minute, longer where the network is slow." >&2
        "${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
            fail "no Python 3.10 to 3.13. Install one, or name it: PYTHON=/path/to/python"
        "${PYTHON:-python3}" -m venv --clear "$venv" || fail "${PYTHON:-python3} could not make $venv"
        # Of the lock, uv's entry alone: its pin and the continued lines with its hashes.
        "$python" -m pip --timeout 15 --retries 2 install --quiet --disable-pip-version-check --no-deps \
            --require-hashes -r <(sed -n '/^uv==/,/[^\\]$/p' "$project/requirements.txt") ||
            fail "the installer uv could not be installed. Another package index: PIP_INDEX_URL=https://..."
    fi
    rm -f "$venv/stamp"
    # Shown: progress and what is wrong, but not each package, nor that uv's cache is on another disk.
    uv "${sync[@]}" 2>&1 | awk '/^warning: Failed to hardlink/, /suppress this warning/ { next }
        !/^ [-+~] |^(Using|Resolved|Checked) / { print; fflush() }' >&2 ||
        fail "the packages of requirements.txt could not be installed"
    PYTHON='' stamp > "$venv/stamp"
}
if ! is_complete; then
    exec 9< "$project/requirements.txt"
    flock 9 2> /dev/null || true # waits for another run that installs; some file systems and macOS have no such lock
    is_complete || install
    exec 9<&-
fi
export VIRTUAL_ENV=$venv PATH="$venv/bin:$PATH"
