#!/bin/sh
# From a table with other values in each row to a dataset on disk.
# Run: examples/table.sh FOLDER
set -eu

folder=${1:-table}
pipeline=${FARM_EXAMPLE_PIPELINE:-demo}
table=$(mktemp -d)/table.csv

# An empty cell means: as the job says.
cat > "$table" <<'CSV'
key,prompt,width,steps,guidance_scale,seed
star-10,a red star on a white background,,10,,1
star-25,a red star on a white background,,25,,1
star-wide,a red star on a white background,96,25,,1
heart-free,a green heart on a white background,,25,1.5,2
heart-strict,a green heart on a white background,,25,4,2
CSV

# The same table and name are the same job. So an interrupted run can be repeated.
job=$(farm submit --from "$table" --name "table-$(basename "$folder")" --pipeline "$pipeline" \
  --watch --json | tail -n 1 | python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])')
farm export "$job" --to imagefolder --dest "$folder"
ls "$folder"/data/00000
