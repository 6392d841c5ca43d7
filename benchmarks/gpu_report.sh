#!/usr/bin/env bash
# Everything that a GPU has to say, with one command: builds the compiled library in place, runs compute-sanitizer on
# the smallest shapes, the tests marked `gpu` and the benchmarks, and writes at most 8 files. A stage that fails does
# not stop the next. Needs one GPU, nvcc, a Python with torch and Triton, and no network. `python -m benchmarks.report
# --take OUT_FOLDER` then puts the results in their place. Without a GPU the same runs emulated, on tiny sizes.
set -uo pipefail
usage="usage: benchmarks/gpu_report.sh [-f FAMILY]... [-k TESTS] OUT_FOLDER
  -f FAMILY  this family alone; may be repeated
  -k TESTS   of the tests those that pytest's -k selects
environment:
  PYTHON               the Python to use, default python3
  EVAKERNELS_WHEELS    a folder with wheels of what the build lacks (pybind11, cmake, ninja)
  EVAKERNELS_COMMIT    the commit, where the sources lie without git's folder
  EVAKERNELS_SECONDS   for everything, default 570"
families=() only=()
while getopts f:k: option; do
  case $option in
    f) families+=("$OPTARG") ;;
    k) only=("$OPTARG") ;;
    *) echo "$usage" >&2; exit 2 ;;
  esac
done
shift $((OPTIND - 1))
[ $# -eq 1 ] || { echo "$usage" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
end=$((SECONDS + ${EVAKERNELS_SECONDS:-570}))
python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3}" >&2; exit 2; }
export PATH="$(dirname "$python"):$PATH" PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
rm -f "$out"/{environment.txt,build.log,sanitizer.log,tests.log,benchmarks.log,results.csv,provenance.json,report.json}
touch "$work/stages"

# stage NAME SECONDS LOG COMMAND...: runs a command, appends what it says to a log and how it ended to the stages.
stage() {
  local name=$1 limit=$2 log=$out/$3 began=$SECONDS left code status
  shift 3
  left=$((end - SECONDS))
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 1 ]; then
    skip "$name" "$(basename "$log")" "no time is left"
    return 1
  fi
  printf '== %s: %s\n' "$name" "$*" >>"$log"
  timeout -k 5 "$limit" "$@" >>"$log" 2>&1
  code=$?
  case $code in 0) status=passed ;; 124 | 137) status="stopped after $limit s" ;; *) status="failed with status $code" ;; esac
  printf '== %s: %s, %d s\n' "$name" "$status" $((SECONDS - began)) | tee -a "$log"
  printf '%s\t%s\t%d\n' "$name" "$status" $((SECONDS - began)) >>"$work/stages"
  return "$code"
}

# skip NAME LOG WHY
skip() {
  printf '== %s: skipped: %s\n' "$1" "$3" | tee -a "$out/$2"
  printf '%s\tskipped: %s\t0\n' "$1" "$3" >>"$work/stages"
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))' 2>"$work/torch.log") || {
  cat "$work/torch.log" >&2
  echo "$python has no torch that imports" >&2
  exit 2
}
{
  date -u
  uname -a
  "$python" -VV
  if command -v nvidia-smi >/dev/null; then nvidia-smi; fi
  "$python" -c "
from benchmarks import harness
for name in 'torch triton numpy pybind11 pytest xdist cuda.bindings liger_kernel apex timm flash_attn xformers'.split():
    found = harness.peer(name)
    print(name, found if isinstance(found, str) else getattr(found, '__version__', 'present'))"
} >"$out/environment.txt" 2>&1

nvcc=${CUDACXX:-$({ [ -n "${CUDA_HOME:-}" ] && command -v "$CUDA_HOME/bin/nvcc"; } || command -v nvcc || command -v /usr/local/cuda/bin/nvcc)}
library=()
build() {
  local missing=() wheels=()
  for tool in cmake ninja; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  has pybind11 || missing+=(pybind11)
  if [ ${#missing[@]} -gt 0 ] && [ -n "${EVAKERNELS_WHEELS:-}" ]; then
    stage wheels 60 build.log "$python" -m pip install --no-index --find-links "$EVAKERNELS_WHEELS" "${missing[@]}" && missing=()
  fi
  if [ -z "$nvcc" ]; then
    skip build build.log "nvcc was not found"
  elif [ ${#missing[@]} -gt 0 ]; then
    skip build build.log "missing: ${missing[*]}; give a folder with their wheels in EVAKERNELS_WHEELS"
  else
    stage configure 60 build.log cmake --fresh -S . -B build/gpu_report -G Ninja -DCMAKE_BUILD_TYPE=Release \
      -DCMAKE_CUDA_COMPILER="$nvcc" -DPython_EXECUTABLE="$python" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/evakernels" \
      -DEVAKERNELS_ARCHITECTURES="${EVAKERNELS_ARCHITECTURES:-$architecture-real}" &&
      stage build 240 build.log cmake --build build/gpu_report --parallel "${MAX_JOBS:-$(nproc)}"
  fi
}

if [ "$gpu" = 1 ]; then
  architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  build
  if command -v compute-sanitizer >/dev/null || [ -x /usr/local/cuda/bin/compute-sanitizer ]; then
    sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    for tool in memcheck racecheck initcheck; do
      # Without its own cache, torch's allocations are those that the tool knows; kernels of namespace ek alone.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 60 sanitizer.log "$sanitizer" --tool "$tool" \
        --kernel-name kns=_ZN2ek --error-exitcode 9 "$python" -m benchmarks.smallest ${families[@]+"${families[@]}"}
    done
  else
    skip sanitizer sanitizer.log "compute-sanitizer was not found"
  fi
  tests=(-m gpu) quick=() workers=4
else
  skip nvcc build.log "there is no GPU; the emulated library is built instead"
  if stage build 240 build.log "$python" tests/emulator/build.py ${families[@]+"${families[@]}"}; then
    EVAKERNELS_EMULATED_LIBRARY=$(grep '^/.*\.so$' "$out/build.log" | tail -1)
    export EVAKERNELS_EMULATED_LIBRARY # for the tests
    library=(--library "$EVAKERNELS_EMULATED_LIBRARY")
  fi
  skip compute-sanitizer sanitizer.log "there is no GPU; the emulated library checks every access itself"
  stage emulator 120 sanitizer.log "$python" -m benchmarks.smallest ${library[@]+"${library[@]}"} ${families[@]+"${families[@]}"}
  tests=(-k "emulated${only:+ and (${only[*]})}") quick=(--quick) workers=0 only=()
fi

folders=()
for family in ${families[@]+"${families[@]}"}; do [ -d "tests/$family" ] && folders+=("tests/$family"); done
has xdist && workers=(-n "$workers") || workers=()
stage tests 180 tests.log "$python" -m pytest -q -o addopts= --import-mode=importlib -ra -p no:cacheprovider \
  --continue-on-collection-errors --junitxml "$work/tests.xml" "${tests[@]}" ${only[@]+-k "${only[@]}"} \
  ${workers[@]+"${workers[@]}"} ${folders[@]+"${folders[@]}"}

[ ${#families[@]} -gt 0 ] || families=(norm swiglu lamb tokens host contrastive attention)
chosen=()
for family in "${families[@]}"; do chosen+=(--family "$family"); done
stage benchmarks $((end - SECONDS - 15)) benchmarks.log "$python" -m benchmarks ${quick[@]+"${quick[@]}"} \
  ${library[@]+"${library[@]}"} --out "$work/results" "${chosen[@]}"

"$python" -m benchmarks.gpu_summary "$work" "$out"
