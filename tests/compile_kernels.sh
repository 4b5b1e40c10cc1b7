#!/usr/bin/env bash
# Compiles every kernels/*.cu by itself for every device that it is for, as build.rs does, and fails where
# one spills registers, or where the kernels are not those that src/backend/cuda/launch/kernel.rs names.
# Prints registers and shared memory of each kernel: the compiler's report, for want of a GPU.
#
#   tests/compile_kernels.sh [architecture...]      such as 90a; all by default
#   tests/compile_kernels.sh --built                reads what the compiler said when target/release was built
set -euo pipefail
cd "$(dirname "$0")/.."

built=
if [ "${1:-}" = --built ]; then built=target/blockem-kernels/reports; shift; fi

architectures=("$@")
[ $# -gt 0 ] || architectures=(80 86 89 90a 100 120)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# NAME_sm90.cu is for 90a alone, which then has no NAME.cu.
is_for() { # source architecture
  if [[ $1 == *_sm90.cu ]]; then [ "$2" = 90a ]; else [ "$2" != 90a ] || [ ! -e "${1%.cu}_sm90.cu" ]; fi
}

compile_all() {
  nvcc=${BLOCKEM_NVCC:-}
  for found in .venv/cuda/nvidia/*/bin/nvcc .venv/lib/python3*/site-packages/nvidia/*/bin/nvcc "$(command -v nvcc || true)"; do
    if [ -z "$nvcc" ] && [ -x "$found" ]; then nvcc=$found; fi
  done
  if [ -z "$nvcc" ]; then
    echo "compile_kernels.sh: no nvcc; \`make test\` installs it, or set BLOCKEM_NVCC" >&2
    exit 1
  fi
  export nvcc folder
  for source in kernels/*.cu; do
    for architecture in "${architectures[@]}"; do
      ! is_for "$source" "$architecture" || echo "$source" "$architecture"
    done
  done | xargs -P "$(nproc)" -L 1 bash -c 'compile "$0" "$1"'
}

compile() { # source architecture: the report of ptxas goes to a file of its own
  local name
  name=$(basename "$1" .cu)
  "$nvcc" -std=c++17 -O3 -Ikernels -arch="sm_$2" -Xptxas -v -cubin \
    -o "$folder/$name.$2.cubin" "$1" > "$folder/$name.$2.txt" 2>&1 \
    || { echo "$1 does not compile for sm_$2:" >&2; cat "$folder/$name.$2.txt" >&2; return 1; }
}
export -f compile

# A report of one source holds each device's kernels in turn.
split_reports() {
  local report name
  while read -r report; do
    name=$(basename "$report" .txt)
    awk -v out="$folder/${name%-*}." '
      /Compiling entry function/ { split($0, quoted, "\x27"); file = out substr(quoted[4], 4) ".txt"; open++ }
      file != "" { print > file }
      /Used [0-9]+ registers/ { open-- }
      open < 0 || open > 1 { print FILENAME ": reports of two kernels are mixed" > "/dev/stderr"; exit 1 }
    ' "$report"
  done < "$built"
}

if [ -n "$built" ]; then
  for source in kernels/*; do
    if [ ! -e "$built" ] || [ "$source" -nt "$built" ]; then
      echo "compile_kernels.sh: $built is older than $source: \`make build\` with nvcc first" >&2
      exit 1
    fi
  done
  split_reports
else
  compile_all
fi

awk '
  FNR == 1 {
    n = split(FILENAME, part, "/"); split(part[n], word, ".")
    architecture = word[2]
  }
  /Compiling entry function/ { split($0, quoted, "\x27"); kernel = quoted[2] }
  /bytes stack frame/ {
    for (i = 1; i < NF; i++) {
      if ($i == "bytes" && $(i + 1) == "spill" && $(i - 1) > 0) spilled = $0
    }
  }
  /Used [0-9]+ registers/ {
    shared = 0
    for (i = 1; i < NF; i++) {
      if ($i == "registers," || $i == "registers") registers = $(i - 1)
      if ($i == "bytes" && $(i + 1) ~ /^smem/) shared = $(i - 1)
    }
    printf "sm_%-5s %-28s %4d registers %6d bytes of static shared memory%s\n", architecture, kernel,
           registers, shared, spilled == "" ? "" : "  SPILLS"
    if (spilled != "") { bad++; print "  " spilled }
    spilled = ""; kernels++
  }
  END {
    if (kernels == 0) { print "no kernel was reported: has the compiler changed its words?"; exit 1 }
    if (bad > 0) { print bad " of " kernels " kernels spill"; exit 1 }
    print kernels " kernels compiled, none spills"
  }' "$folder"/*.txt

# The families of kernel.rs say which device has which kernels.
named() { # architecture
  awk -v own="$([ "$1" = 90a ] && echo Sm90 || echo Portable)" '
    /^    [A-Z][A-Za-z0-9]+ {$/ { family = $1 }
    match($0, /c"blockem_[a-z0-9_]*"/) && (family == "Any" || family == own) {
      print substr($0, RSTART + 2, RLENGTH - 3)
    }' src/backend/cuda/launch/kernel.rs | sort
}
for architecture in "${architectures[@]}"; do
  made=$(sed -n "s/.*Compiling entry function '\([^']*\)'.*/\1/p" "$folder"/*."$architecture".txt | sort)
  if ! diff <(named "$architecture") <(echo "$made"); then
    echo "sm_$architecture: kernel.rs (<) and kernels/*.cu (>) name different kernels" >&2
    exit 1
  fi
done

# Launches of a fused call at T = 8192, d = 4096 on an H200 (132 multiprocessors, each with 65,536
# registers, 228 KiB of shared memory, 2,048 threads).
if [[ " ${architectures[*]} " == *" 90a "* ]] && command -v cargo > /dev/null; then
  echo
  echo "fused calls, T=8192 d=4096, sm_90a: occupancy from the compiler's registers, bytes and bf16 operations from the launch"
  printf "%-9s %5s %-28s %7s %8s %9s %10s %10s %12s %9s\n" \
    dtype K kernel blocks 'cluster' 'per SM' 'warps/SM' 'MiB moved' 'MiB of W, L2' 'TFLOP'
  # Built for `make test-rust` already.
  cargo test --locked --quiet --features test-isa --target-dir target/isa --lib cuda::launch::tests::footprints -- --nocapture \
    | grep '^launch ' > "$folder/launches"
  awk '
    FNR == NR {
      if (/Compiling entry function/) { split($0, quoted, "\x27"); kernel = quoted[2] }
      if (/Used [0-9]+ registers/) {
        for (i = 1; i < NF; i++) if ($i ~ /^registers,?$/) registers[kernel] = $(i - 1)
      }
      next
    }
    {
      # Four schedulers share the warps, so their registers come in fours of warps.
      rounded = int((registers[$4] + 7) / 8) * 8
      warps = int(($7 + 127) / 128) * 4
      blocks = int(65536 / (rounded * 32 * warps))
      if ($8 > 0 && int(233472 / ($8 + 1024)) < blocks) blocks = int(233472 / ($8 + 1024))
      if (int(2048 / $7) < blocks) blocks = int(2048 / $7)
      printf "%-9s %5d %-28s %7d %8d %9d %10d %10.1f %12.1f %9.3f\n", $2, $3, $4, $5, $6, blocks,
             blocks * $7 / 32, $9 / 1048576, $10 / 1048576, $11 / 1e12
    }' <(cat "$folder"/*.90a.txt) "$folder/launches"
fi
