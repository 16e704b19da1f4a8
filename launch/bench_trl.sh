#!/usr/bin/env bash
# Compare a training step with TRL's PPOTrainer: make an environment with the last TRL that has it, then `dvpo bench trl`.
#
#   launch/bench_trl.sh CONFIG [KEY=VALUE ...] [--set ALGORITHM:KEY=VALUE] [--repeats N] [--rounds N] [--out DIR]
#
# PYTHON=/path/to/python3.12      the Python to build on (default: that of .venv)
# DVPO_VENV=/path                 where dvpo is installed (default: .venv)
# DVPO_TRL_VENV=/path             where to build (default: .venv-trl)
set -euo pipefail
[[ " $* " != *" -h "* && " $* " != *" --help "* ]] || { sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" && exit; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=${DVPO_VENV:-$root/.venv}/bin
venv=${DVPO_TRL_VENV:-$root/.venv-trl}
trl=trl==1.12.0

fail() {
    printf 'bench_trl.sh: %s\n' "$1" >&2
    exit 2
}

# Both sides on one torch and one transformers, so that only the training loops differ.
requirements() {
    "$bin/python" -c 'import torch, transformers; print(f"torch=={torch.__version__} transformers=={transformers.__version__}")'
}

make_environment() {
    rm -rf "$venv"
    "${PYTHON:-$bin/python}" -m venv "$venv"
    local pip=("$venv/bin/python" -m pip install --no-input --disable-pip-version-check --quiet)
    # Builds of torch with +cpu or +cu in their version may be in PyTorch's own index only.
    "${pip[@]}" "$torch" 2>/dev/null || "${pip[@]}" --index-url "https://download.pytorch.org/whl/${torch##*+}" "$torch"
    "${pip[@]}" "$torch" "$transformers" "$trl"
    echo "$torch $transformers $trl" >"$venv/complete"
}

(($#)) || fail "which config? usage: launch/bench_trl.sh CONFIG [KEY=VALUE ...] [--set ALGORITHM:KEY=VALUE] [--repeats N] [--rounds N] [--out DIR]"
[[ -x $bin/dvpo ]] || fail "$bin/dvpo is not there; run launch/install.sh first"
unset PYTHONPATH PYTHONHOME
read -r torch transformers <<<"$(requirements)"
if [[ "$(cat "$venv/complete" 2>/dev/null || true)" != "$torch $transformers $trl" ]]; then
    echo "bench_trl.sh: making $venv with $trl, $torch and $transformers"
    make_environment || fail "could not make $venv; the lines above say why"
fi
exec "$bin/dvpo" bench trl "$@" --trl-python "$venv/bin/python"
