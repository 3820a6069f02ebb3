#!/bin/sh
# An image knows how it was rendered: render it again from its own text, and compare the two.
# Run: examples/replay.sh
set -eu

folder=$(mktemp -d)
pipeline=${FARM_EXAMPLE_PIPELINE:-demo}

job=$(farm submit "a yellow circle on a blue background" --pipeline "$pipeline" --seed 31 \
  --watch --json | tail -n 1 |
  python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])')
farm get "$job" --dest "$folder"
farm replay "$folder"/*.png
