#!/usr/bin/env bash
# Install what is missing, then improve a real language model by DVPO: `dvpo quickstart` with the same arguments.
#
#   launch/quickstart.sh [KEY=VALUE ...] [--out DIR] [--steps N] [--dry-run]
#
# DVPO_VENV=/path              where dvpo is installed, or will be (default: .venv)
set -euo pipefail
[[ " $* " != *" -h "* && " $* " != *" --help "* ]] || { sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" && exit; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DVPO_VENV:-$root/.venv}

"$root/launch/install.sh"
export PATH=$venv/bin:$PATH
exec dvpo quickstart "$@"
