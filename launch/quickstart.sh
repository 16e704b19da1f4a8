#!/usr/bin/env bash
# Install what is missing, then improve a real language model by DVPO: `dvpo quickstart` with the same arguments.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DVPO_VENV:-$root/.venv}

"$root/launch/install.sh"
export PATH=$venv/bin:$PATH
exec dvpo quickstart "$@"
