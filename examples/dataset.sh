#!/bin/sh
# From a file of prompts to a WebDataset on disk.
# Run: examples/dataset.sh FOLDER
set -eu

folder=${1:-shapes}
pipeline=${FARM_EXAMPLE_PIPELINE:-demo}
prompts=$(mktemp -d)/prompts.csv

cat > "$prompts" <<'CSV'
key,prompt
star-red,a red star on a white background
star-blue,a blue star on a white background
heart-green,a green heart on a white background
CSV

# The same prompts and name are the same job. So an interrupted run can be repeated.
job=$(farm submit --from "$prompts" --name "example-$(basename "$folder")" --pipeline "$pipeline" --images 2 \
  --priority bulk --watch --json | tail -n 1 |
  python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])')
farm export "$job" --to webdataset --dest "$folder"
tar -tf "$folder"/data/00000.tar
