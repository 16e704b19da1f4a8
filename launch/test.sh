#!/usr/bin/env bash
# Install what is missing, then run all tests, fast ones first. Arguments go to pytest:
#
#   launch/test.sh -m "not slow" -k batch
#
# DVPO_VENV=/path              where dvpo is installed, or will be (default: .venv)
set -euo pipefail
[[ " $* " != *" -h "* && " $* " != *" --help "* ]] || { sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" && exit; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DVPO_VENV:-$root/.venv}

"$root/launch/install.sh" dev
cd "$root"
export PATH=$venv/bin:$PATH
exec python -m pytest "$@"
