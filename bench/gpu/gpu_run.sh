#!/bin/bash
# One run on a GPU, in the root of the checkout: `bash .gpu/gpu_run.sh` after `make gpu-run`. See bench/gpu/README.md.
# LIMIT: seconds for all of it. PARTS: which parts. PYTHON: with torch and triton. OUT: where results go.
# SMALL=1: variants on small tensors. Every part has a limit of its own, and none stops the next.
set -u
LIMIT=${LIMIT:-530}
PARTS=${PARTS:-environment smoke verify tests variants step profiler checker}
PYTHON=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
OUT=${OUT:-$here/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
rm -f "$OUT"/{summary.txt,log.txt,profile.txt,verify.json,variants.json,step-fp32.json,step-bf16.json,host.json}
export cores=$(nproc) # before OMP_NUM_THREADS, which nproc obeys
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(mktemp -d)}
mkdir -p "$TRITON_CACHE_DIR"

say() { echo "$*" | tee -a "$OUT/summary.txt"; }
wanted() { [[ " $PARTS " == *" $1 "* ]]; }
has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2> /dev/null; }
kernels() { find "$TRITON_CACHE_DIR" -name '*.cubin' | wc -l; }

# part NAME SECONDS FILE PATTERN COMMAND...: what COMMAND prints goes to FILE; to the summary go its exit code, its last
# line if it failed, and the lines that match PATTERN.
part() {
  local name=$1 limit=$2 file=$OUT/$3 pattern=$4 left=$((LIMIT - SECONDS)) begin=$SECONDS text code
  shift 4
  if ((left < 15)); then
    say "[$name] left out: $left s are left of $LIMIT"
    return
  fi
  ((limit < left)) || limit=$left
  text=$(mktemp)
  timeout -s INT -k 5 "$limit" "$@" > "$text" 2>&1 # the benchmark then writes what it has
  code=$?
  { echo "===== $name: exit $code, $((SECONDS - begin)) s"; cat "$text"; } >> "$file"
  if ((code == 124 || code == 137)); then
    say "[$name] stopped at its limit of $limit s"
  elif ((code == 0)); then
    say "[$name] done in $((SECONDS - begin)) s"
  else
    say "[$name] exit $code after $((SECONDS - begin)) s: $(grep -v '^$' "$text" | tail -1 | cut -c1-200)"
  fi
  grep -E "$pattern" "$text" | cut -c1-200 | head -90 | sed 's/^/    /' | tee -a "$OUT/summary.txt"
  rm -f "$text"
}

if [ -f "$here/cache.tgz" ]; then
  tar -xzf "$here/cache.tgz" -C "$TRITON_CACHE_DIR"
  # Triton's lists of files hold absolute paths; the packed ones have a mark in the folder's place.
  find "$TRITON_CACHE_DIR" -name '__grp__*.json' -exec sed -i "s|@CACHE@|$TRITON_CACHE_DIR|g" {} +
fi
carried=$(kernels)

if wanted environment; then
  part environment 40 log.txt '^(GPU|card|tools|packages|machine):|MiB' bash -c '
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem --format=csv,noheader ||
      echo "card: none that nvidia-smi names"
    echo "tools: $(for t in ncu compute-sanitizer nvcc gcc; do command -v $t || echo "no $t"; done | xargs)"
    echo "machine: $cores cores, $(free -g | awk "/Mem/ {print \$2}") GB"
    "$0" - << "END"
import importlib.metadata as metadata
names = "torch triton numpy pytest pytest-xdist pytest-timeout hypothesis expecttest".split()
installed = {one.metadata["Name"].lower(): one.version for one in metadata.distributions() if one.metadata["Name"]}
print("packages:", ", ".join(name + " " + installed.get(name, "none") for name in names))
import torch
print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "there is no GPU here")
END
    "$0" -m bench env' "$PYTHON"
fi

if wanted smoke; then
  part smoke 70 log.txt '^FAILED|promises hold|no GPU' "$PYTHON" "$here/smoke.py"
fi

if wanted verify; then
  part verify 60 log.txt 'hash|copy|FAILED|error' "$PYTHON" -m bench verify --device cuda --json "$OUT/verify.json"
fi

if wanted tests; then
  # Meanwhile the variants are compiled, where there are cores for it.
  background=()
  if wanted variants && ((cores >= 4)); then
    for i in 0 1; do
      timeout 100 "$PYTHON" "$here/variants.py" --compile $i/2 > /dev/null 2>&1 &
      background+=($!)
    done
  fi
  if has pytest; then
    # pytest-benchmark warns beside pytest-xdist, and warnings are errors.
    options=(-m gpu -q -p no:cacheprovider -p no:benchmark --continue-on-collection-errors --tb=short -rfE)
    # Minutes under the memory checker: the last part has a short run of it.
    options+=(-k "not memory_checker")
    if has xdist; then options+=(-n "$((cores > 14 ? 12 : cores))"); fi
    if has pytest_timeout; then options+=(--timeout 120); fi
    mapfile -t files < <(grep -lE 'mark\.gpu|kernel_device' tests/*/test_*.py)
    part tests "${TESTS_SECONDS:-160}" log.txt '^(FAILED|ERROR|SKIPPED.*GPU)|(passed|failed|skipped|error).* in ' \
      "$PYTHON" -m pytest "${options[@]}" "${files[@]}"
  else
    say "[tests] left out: pytest is not installed"
  fi
  ((${#background[@]} == 0)) || wait "${background[@]}"
  say "    kernels: $carried carried, $(($(kernels) - carried)) compiled here"
fi

# From here on nothing else runs.
if wanted variants; then
  part variants 110 log.txt 'GB/s|same bits|^WRONG|no GPU' \
    "$PYTHON" "$here/variants.py" --seconds 60 --json "$OUT/variants.json" ${SMALL:+--numel 65536}
fi

if wanted step; then
  rows='^(FusedAdamW|torch )|FAILED|not measured|error|bandwidth'
  step=("$PYTHON" -m bench step --device cuda)
  models=${SMALL:+gpt2/64,many-small}
  part "step fp32" 90 log.txt "$rows" "${step[@]}" --model "${models:-llama-3-8b/16,gpt2,many-small}" --seconds 14 \
    --peers torch-fused,torch-foreach --json "$OUT/step-fp32.json"
  part "step bf16" 90 log.txt "$rows" "${step[@]}" --model "${models:-llama-3-8b/16,gpt2}" --dtype bfloat16 --seconds 14 \
    --precision none,split32-bf16,sr-bf16,split24-int8 --peers torch-fused --json "$OUT/step-bf16.json"
  part host 35 log.txt "$rows" "$PYTHON" -m bench host --device cuda --tensors 100,1000 --seconds 12 \
    --peers torch-fused,torch-foreach --json "$OUT/host.json"
fi

if wanted profiler; then
  if command -v ncu > /dev/null; then
    profile=(ncu --clock-control none --kernel-name regex:adam_kernel --launch-skip 2 --launch-count 1)
    for section in SpeedOfLight Occupancy WarpStateStats MemoryWorkloadAnalysis LaunchStats; do
      profile+=(--section "$section")
    done
    for case in "float32" "bfloat16" "bfloat16 split24-int8"; do
      # shellcheck disable=SC2086
      part "ncu $case" 30 profile.txt \
        '(DRAM|Memory) Throughput|Achieved Occupancy|Duration|Registers Per|No Eligible|L2 Hit|No kernels|ERR|no GPU' \
        "${profile[@]}" "$PYTHON" "$here/launches.py" profile $case
    done
  else
    say "[profiler] left out: ncu is not installed"
  fi
fi

if wanted checker; then
  if command -v compute-sanitizer > /dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else one allocation of torch's holds many tensors
    for tool in memcheck racecheck; do
      part "$tool" 60 profile.txt 'SUMMARY|all steps done|Invalid|out of bounds|no GPU' \
        compute-sanitizer --error-exitcode 9 --tool $tool "$PYTHON" "$here/launches.py" check
    done
  else
    say "[checker] left out: compute-sanitizer is not installed"
  fi
fi

say "all: $SECONDS s; results: $OUT"
printf '\n===== SUMMARY\n'
cat "$OUT/summary.txt"
