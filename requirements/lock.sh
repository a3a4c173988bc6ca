#!/usr/bin/env bash
# Resolves the files beside it again from pyproject.toml; `make lock` calls it with PYTHON, best 3.11.
#
#   cpu.txt, gpu.txt   the service with either runtime, for every platform and Python, with hashes (uv)
#   constraints.txt    everything that `make setup` installs: the pins of cpu.txt and, for the rest, what pip chose
#
# Everything takes its newest version; torch is what pyproject.toml pins. No index address is written.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}

"$python" -m venv "$work/uv"
"$work/uv/bin/pip" install --quiet uv
for runtime in cpu gpu; do
    "$work/uv/bin/uv" pip compile --quiet pyproject.toml --extra "$runtime" \
        --universal --python-version 3.11 --generate-hashes --no-header --output-file "$work/$runtime.txt" >/dev/null
    {
        echo "# The service with the $runtime runtime. Made from pyproject.toml by \`make lock\`: do not edit."
        echo "#   pip install --require-hashes -r requirements/$runtime.txt"
        cat "$work/$runtime.txt"
    } >"requirements/$runtime.txt"
done

sed -n 's/^\([a-z0-9].*==.*[^ ]\) *\\$/\1/p' requirements/cpu.txt >"$work/service.txt"
"$python" -m venv "$work/all"
"$work/all/bin/pip" install --quiet --constraint "$work/service.txt" --editable '.[cpu,train,dev]'
"$work/all/bin/pip" freeze --exclude-editable | sed 's/+[a-z0-9.]*$//' >"$work/all.txt"
{
    echo "# What \`make setup\` installs beside the service. Made from pyproject.toml by \`make lock\`: do not edit."
    echo "# The service's own packages stand here as cpu.txt pins them, so that both files always agree."
    {
        cat "$work/service.txt"
        awk -F== 'function key(name) { gsub(/[-_.]+/, "-", name); return tolower(name) }
            NR == FNR { seen[key($1)]; next } !(key($1) in seen)' "$work/service.txt" "$work/all.txt"
    } | sort -f
} >"$work/constraints.txt"
cp "$work/constraints.txt" requirements/constraints.txt
