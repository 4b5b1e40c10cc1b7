#!/usr/bin/env bash
# Makes every part of `make test`, whatever becomes of the others, and ends with a table of what each took
# and which failed. Parts that are joined by commas run at the same time.
#
#   tests/parts.sh PART[,PART...]...        (MAKE says which make)
#
# A part's log is printed as it runs; of parts at the same time, the later ones' when they have ended.
set -uo pipefail
cd "$(dirname "$0")/.."

MAKE=${MAKE:-make}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
names=() seconds=() statuses=()

run() { # part: leaves its status and seconds in files
  local start=$SECONDS status=0
  $MAKE --no-print-directory "$1" || status=$?
  echo "$status $((SECONDS - start))" > "$logs/$1.result"
}

for group in "$@"; do
  IFS=, read -ra together <<< "$group"
  for part in "${together[@]:1}"; do run "$part" > "$logs/$part.log" 2>&1 & done
  echo "==== ${together[0]}"
  run "${together[0]}"
  wait
  for part in "${together[@]}"; do
    if [ -e "$logs/$part.log" ]; then echo "==== $part"; cat "$logs/$part.log"; fi
    read -r status took < "$logs/$part.result"
    names+=("$part") statuses+=("$status") seconds+=("$took")
  done
done

failed=0
printf '\n%-20s %8s  %s\n' part 'min:s' result
for i in "${!names[@]}"; do
  result=passed
  if [ "${statuses[i]}" != 0 ]; then result="FAILED: make ${names[i]}" failed=$((failed + 1)); fi
  printf '%-20s %5d:%02d  %s\n' "${names[i]}" $((seconds[i] / 60)) $((seconds[i] % 60)) "$result"
done
printf '%-20s %5d:%02d\n' total $((SECONDS / 60)) $((SECONDS % 60))
echo "make test: $((${#names[@]} - failed)) passed, $failed failed"
[ "$failed" = 0 ]
