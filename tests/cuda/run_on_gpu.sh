#!/bin/bash
# Everything that a GPU has to show, in one call:
#   run_on_gpu.sh CUDA_TEST [COMPUTE_SANITIZER] [RANDOM_PROBLEMS]
# The suite, the sanitizer's four tools on a few cases, random problems. One line a step, and the
# output of a step that failed; exit 1 if one did. The reference runs on the CPU: steps are spread
# over its cores.
set -u
test=$(realpath "$1")
sanitizer=${2:-compute-sanitizer}
problems=${3:-1000}
cores=$(nproc)
logs=${OUT:-$(mktemp -d)}
failed=0

report() {  # name, status, log, seconds
  local tests
  tests=$(grep -ohE '\[  PASSED  \] [0-9]+|[0-9]+ random problems' "$3" | grep -oE '[0-9]+' |
          awk '{n += $1} END {print n + 0}')
  if [ "$2" -eq 0 ]; then
    echo "ok     $1: $tests, $(grep -c 'SKIPPED  \] [A-Z]' "$3") skipped, $4 s"
  else
    echo "FAILED $1 ($4 s)"
    grep -E 'relative error|FAILED|Failure|what\(\)|=========|SLA2_RANDOM_FIRST' "$3" | head -60
    failed=1
  fi
}

# shards NAME COUNT SETUP ARGUMENTS...: one process a shard; SETUP is evaluated with $i set.
shards() {
  local name=$1 count=$2 setup=$3 status=0 begin=$SECONDS pids=()
  shift 3
  for ((i = 0; i < count; ++i)); do
    (eval "$setup"; exec "$test" --gtest_brief=0 "$@") > "$logs/$name.$i.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  cat "$logs/$name".*.log > "$logs/$name.log"
  rm "$logs/$name".*.log
  report "$name" $status "$logs/$name.log" $((SECONDS - begin))
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
shards suite "$cores" 'export GTEST_TOTAL_SHARDS='"$cores"' GTEST_SHARD_INDEX=$i' \
  --gtest_filter='-CudaRandom.*:CudaGpu.MoreThan*'
shards large 1 ':' --gtest_filter='CudaGpu.MoreThan*'

cases='*/plain_hard_bf16:*/plain_soft_bf16:*/plain_hard_f32:*/int8_hard_bf16:*/fp8_hard_bf16'
cases+=':*/sla_hard_bf16:*/lengths_soft_bf16:*/matched_hard_bf16:*/padded_hard_bf16:*/grouped_soft_bf16'
pids=()
begin=$SECONDS
for tool in memcheck racecheck initcheck synccheck; do
  "$sanitizer" --tool $tool --error-exitcode 9 "$test" --gtest_filter="$cases" \
    > "$logs/$tool.log" 2>&1 &
  pids+=($!)
done
for tool in memcheck racecheck initcheck synccheck; do
  wait "${pids[0]}"
  report $tool $? "$logs/$tool.log" $((SECONDS - begin))
  pids=("${pids[@]:1}")
done

each=$(((problems + cores - 1) / cores))
shards random "$cores" \
  'export SLA2_RANDOM_PROBLEMS='"$each"' SLA2_RANDOM_FIRST=$((1 + i * '"$each"'))' \
  --gtest_filter='CudaRandom.*'
exit $failed
