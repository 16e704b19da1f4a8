#!/usr/bin/env bash
# Run `dvpo train CONFIG ...` as a job of a running Ray cluster, and follow its output.
#
#   launch/submit.sh CONFIG [KEY=VALUE ...] [--out DIR] [--resume]
#
# The cluster is that of the head on this machine, or of the head at RAY_API_SERVER_ADDRESS (http://host:8265). The job runs in
# the folder it is submitted from, so that folder and the run folder must be on a file system that the cluster's nodes share.
# The token of a cluster that asks for one: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.
# The exit status is that of `dvpo train`. Ctrl-C stops the output only. `ray job stop ID` stops the job.
set -euo pipefail
[[ " $* " != *" -h "* && " $* " != *" --help "* ]] || { sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" && exit; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=${DVPO_VENV:-$root/.venv}/bin
address=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
[[ $address == *://* ]] || address=http://$address

fail() {
    printf 'submit.sh: %s\n' "$1" >&2
    exit 2
}

# Asks the head for its jobs, or for one: the HTTP status (000 when nobody answers), whether a token was sent, and the state and the
# exit status of that job. By Python, because curl may be absent.
ask_head() {
    "$bin/python" - "$address/api/jobs/${1-}" <<'PYTHON'
import json, os, sys, urllib.error, urllib.request
from pathlib import Path

token = os.environ.get("RAY_AUTH_TOKEN")
path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
if not token and path.is_file():
    token = path.read_text().strip()
request = urllib.request.Request(sys.argv[1], headers={"Authorization": f"Bearer {token}"} if token else {})
try:
    with urllib.request.urlopen(request, timeout=30) as answer:
        job = {} if sys.argv[1].endswith("/") else json.load(answer)
        print(answer.status, "token" if token else "none", job.get("status"), job.get("driver_exit_code"))
except urllib.error.HTTPError as error:
    print(error.code)
except (OSError, ValueError):
    print("000")
PYTHON
}

(($#)) || fail "which config? usage: launch/submit.sh CONFIG [KEY=VALUE ...] [--out DIR] [--resume]"
[[ -x $bin/dvpo && -x $bin/ray ]] || fail "$bin/dvpo is not there; run launch/install.sh first"
# A wrong config or override ends here, with one line and exit status 2. The address keeps out the limits of a local Ray.
RAY_ADDRESS=auto "$bin/dvpo" train "$@" --dry-run >/dev/null

read -r status sent _ <<<"$(ask_head)"
case $status in
    200) ;;
    000) fail "no Ray head answers at $address; start one (ray get-auth-token --generate; ray start --head) or set RAY_API_SERVER_ADDRESS" ;;
    401) fail "the Ray head at $address wants a token; set RAY_AUTH_TOKEN, or copy the head's ~/.ray/auth_token to this machine" ;;
    403) fail "the Ray head at $address refuses this token; RAY_AUTH_TOKEN or ~/.ray/auth_token must be the head's" ;;
    *) fail "$address answers with HTTP status $status; RAY_API_SERVER_ADDRESS must be the address of Ray's dashboard" ;;
esac
# A head that has a token asks for it by itself. Its clients send the token only in this mode.
[[ $sent != token ]] || export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}

# shellcheck disable=SC2016 # expanded by the job's shell
job='cd "$0" && PATH=$1:$PATH && exec dvpo train "${@:2}"'
export RAY_API_SERVER_ADDRESS=$address # with http://; else Ray takes it for an address of another kind
id=dvpo-$(date +%Y%m%d-%H%M%S)-$$
trap 'echo "submit.sh: the job goes on; its output: ray job logs $id --follow" >&2; exit 130' INT
# `ray job stop` kills a job 3 seconds after its SIGTERM; a run saves a checkpoint in that time (termination.grace_seconds).
wait='{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30"}}'
"$bin/ray" job submit --submission-id "$id" --runtime-env-json "$wait" -- bash -c "$job" "$PWD" "$bin" "$@" || submitted=$?

# Ray's own status is 1 for every failure, and 0 for a job that was stopped.
read -r status _ state code <<<"$(ask_head "$id")"
case $status:$state in
    200:SUCCEEDED | 200:FAILED) [[ $code == None ]] || exit $((code < 0 ? 128 - code : code)) ;;
    200:STOPPED) exit 143 ;;
    200:*) fail "the output ended, but the job goes on; its output: ray job logs $id --follow" ;;
    000:*) fail "the Ray head at $address does not answer any more; if it is back: ray job status $id" ;;
esac
exit "${submitted:-1}"
