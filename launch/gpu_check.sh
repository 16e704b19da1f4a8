#!/usr/bin/env bash
# Check this package on a GPU and measure its speed; the table is in OUT/table.md after each step.
#
#   launch/gpu_check.sh OUT [STEP ...] [--device cpu] [--seconds N]
#
# It needs no network and no installation of the package itself: the requirements may be in .venv, or anywhere on PYTHONPATH.
# launch/gpu_check.sh --help lists the steps.
#
# PYTHON=/path/to/python3.12      the Python to run (default: that of .venv, else python3)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DVPO_VENV:-$root/.venv}
[[ -n ${PYTHON:-} || ! -x $venv/bin/python ]] || PYTHON=$venv/bin/python

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_USE_FLASHINFER_SAMPLER=${VLLM_USE_FLASHINFER_SAMPLER:-0}    # its kernels are compiled at their first use
exec "${PYTHON:-python3}" -P -m dvpo_ray.bench.gpu_check "$@"
