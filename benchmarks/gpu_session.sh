#!/usr/bin/env bash
# Everything that wants a GPU, in one go of under ten minutes: on one GPU tests of training and of kernels, benchmark,
# launch constants; on several the head under ZeRO-3, tests of training on all of them, a thousand steps.
# usage, from the repository's root:   OUT=DIR [WHEELS=DIR] bash benchmarks/gpu_session.sh [PART...]
# Parts: training tests run tune, or head zero soak; no argument: all that suit the machine. WHEELS: wheels of what the
# machine lacks, this project's among them for its entry point; they are installed without network and beside the
# machine's own packages.
# Each part has its own time limit and none stops the others. OUT gets machine.txt and a .txt of each part; of tests *.xml,
# by which run times no op whose test is red; of run ops.csv and ops.md, of tune tune.csv, of head zero3_head.md, .json
# and .png.
set -uo pipefail

: "${OUT:?OUT must name the folder for the results}"
gpus=$(nvidia-smi -L | wc -l)
if [ "$gpus" -gt 1 ]; then parts=${*:-head zero soak}; else parts=${*:-training tests run tune}; fi
case " $parts " in *" tests "*) parts+=" tiled" ;; esac
# of one GPU together 9 min 20 s, of several 9 min 40 s; what is killed keeps what it had written
TESTS_SECONDS=${TESTS_SECONDS:-200} RUN_SECONDS=${RUN_SECONDS:-240} TUNE_SECONDS=${TUNE_SECONDS:-120}
HEAD_SECONDS=${HEAD_SECONDS:-140} ZERO_SECONDS=${ZERO_SECONDS:-260} SOAK_SECONDS=${SOAK_SECONDS:-180}
HEAD_WAYS='bare GEMMs,replicated keep_mb=0,replicated keep all,stream,stream copy_engines,stream keep all'
HEAD_WAYS+=',stream copy_engines keep all,stationary'
mkdir -p "$OUT"
cd "$(dirname "$0")/.."

if [ -n "${WHEELS:-}" ]; then
  # without dependencies: no wheel may bring another torch or triton
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PATH=$site/bin:$PATH
fi
# ds_fused is run from the checkout; an interpreter setting left in the environment would test no GPU
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET

{ nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,temperature.gpu,power.limit --format=csv
  python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  python3 -c 'import transformers, liger_kernel; print("transformers", transformers.__version__)'
  python3 -c 'import pytest; print("pytest", pytest.__version__)'
} >"$OUT/machine.txt" 2>&1
cat "$OUT/machine.txt"

# part NAME SECONDS COMMAND...: output to NAME.txt, its end shown
part() {
  local name=$1 seconds=$2; shift 2
  case " $parts " in *" $name "*) ;; *) return 0 ;; esac
  local start=$SECONDS
  # the margin is for the interpreter to write its last lines
  timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$OUT/$name.txt" 2>&1
  local code=$?
  echo "== $name: exit $code after $((SECONDS - start)) s$([ $code -eq 124 ] && echo ' (time limit)')"
}

# with pytest-xdist several workers share the GPU (on H100 124 s with 14, over 200 s without); tests that fill it take
# turns (fixture whole_gpu)
workers=()
if python3 -c 'import xdist' 2>/dev/null; then
  cores=$(nproc)
  workers=(-n $((cores < 14 ? cores : 14)) --dist worksteal)
fi
# small models: beside the kernel tests, most of whose time is compilation on the CPU
part training "$TESTS_SECONDS" python3 -m pytest tests/zero tests/launch -m gpu -v -p no:cacheprovider \
  -rf --tb=short --color=no &
# a layer around ops, which run.py times too
part tiled "$TESTS_SECONDS" python3 -m pytest tests/modules/test_{tiled,sliced}_mlp.py -q -p no:cacheprovider -rf \
  --tb=short --color=no --junit-xml "$OUT/tiled.xml" &
part tests "$TESTS_SECONDS" python3 -m pytest tests/ops -q -p no:cacheprovider -rf --tb=short --show-capture=no \
  --durations=10 --junit-xml "$OUT/tests.xml" ${workers[@]+"${workers[@]}"}
wait
# both or none: of what has no report no test has passed
reports=()
[ -f "$OUT/tests.xml" ] && [ -f "$OUT/tiled.xml" ] && reports=("$OUT/tests.xml" "$OUT/tiled.xml")
part run "$RUN_SECONDS" python3 benchmarks/run.py --out "$OUT" --seconds $((RUN_SECONDS - 15)) \
  ${reports[@]+--tests "${reports[@]}"}
part tune "$TUNE_SECONDS" python3 benchmarks/tune.py --out "$OUT" --seconds $((TUNE_SECONDS - 20))
# one after the other: collectives of several jobs on the same GPUs wait for each other's turns
part head "$HEAD_SECONDS" python3 benchmarks/zero3_head.py --gpus "$gpus" --out "$OUT" --shapes 8192x4096x128256 \
  --rounds 2 --ways "$HEAD_WAYS"
part zero "$ZERO_SECONDS" python3 -m pytest tests/zero/test_zero.py -m gpus -q -p no:cacheprovider -rf --tb=short \
  --color=no
part soak "$SOAK_SECONDS" python3 -m pytest tests/zero/test_soak.py --all -q -p no:cacheprovider -rf --tb=short \
  --color=no

# the reply may carry only the end of the output: what matters most comes last
for name in soak zero head tune run training tiled tests; do
  [ -f "$OUT/$name.txt" ] && { echo "== $name"; tail -n 45 "$OUT/$name.txt" | cut -c 1-200; }
done
exit 0
