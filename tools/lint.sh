#!/bin/sh
# SPDX-License-Identifier: MIT
# The checks that need no running program: tools/lint.sh [--format | --no-tidy]. Exit code 1 if one fails.
#   --format   only rewrite the files with clang-format
#   --no-tidy  without clang-tidy, which takes the most time
# Formatters and linters differ between versions; ours is 14. Another version's findings are printed, but fail nothing.
cd "$(dirname "$0")/.." || exit 1
version=14
format=clang-format-$version
tidy=clang-tidy-$version
command -v "$format" >/dev/null || format=clang-format
command -v "$tidy" >/dev/null || tidy=clang-tidy
failed=""

files() { # files EXTENSION...: ours, whether committed or not yet
  for extension in "$@"; do
    find include src tests bench examples python -name "*.$extension" 2>/dev/null
  done | sort
}

is_ours() { # is_ours TOOL: of the version whose verdict counts
  "$1" --version 2>/dev/null | grep -q "version $version\."
}

verdict() { # verdict NAME STATUS TOOL
  if [ "$2" -eq 0 ]; then
    echo "lint: $1: clean"
  elif is_ours "$3"; then
    echo "lint: $1: FAILED"
    failed="$failed $1"
  else
    echo "lint: $1: the above is from another version than $version and does not count"
  fi
}

run_format() {
  if ! command -v "$format" >/dev/null; then
    echo "lint: clang-format: FAILED, not installed"
    failed="$failed clang-format"
    return
  fi
  files h hpp c cpp cu cuh | xargs -r "$format" --dry-run --Werror
  verdict clang-format $? "$format"
}

reads_headers() { # whether clang-tidy can read this machine's C++ library, which may be younger than it
  probe=build/host/tidy_probe.cpp
  printf '#include <%s>\n' algorithm atomic chrono functional memory mutex optional span string thread vector >$probe
  "$tidy" --quiet $probe -- -std=c++20 >/dev/null 2>&1
}

run_tidy() {
  if [ ! -f build/host/compile_commands.json ] || ! command -v "$tidy" >/dev/null; then
    echo "lint: clang-tidy: FAILED, needs clang-tidy and 'cmake --preset host'"
    failed="$failed clang-tidy"
    return
  fi
  if ! reads_headers; then
    echo "lint: clang-tidy: it cannot read this machine's C++ library and does not count"
    return
  fi
  # Only files of the compilation database; the largest first, so that the last processor is not left with one.
  find src -name '*.cpp' -not -path 'src/cuda/*' -size +0 -exec ls -S {} + |
    while read -r file; do grep -q "/$file\"" build/host/compile_commands.json && echo "$file"; done |
    xargs -r -n 1 -P "${JOBS:-$(nproc)}" "$tidy" -p build/host --quiet 2>build/host/tidy.log
  status=$?
  # What clang counts ("12 warnings generated") is noise; an error of the tool itself is not.
  grep -v 'warnings\{0,1\} \(and [0-9]* errors\{0,1\} \)\{0,1\}generated\|^$' build/host/tidy.log >&2
  verdict clang-tidy $status "$tidy"
}

mode=all
for argument in "$@"; do
  case $argument in
    --format) mode=format ;;
    --no-tidy) mode=no-tidy ;;
    *) echo "usage: tools/lint.sh [--format | --no-tidy]" >&2; exit 2 ;;
  esac
done

if [ "$mode" = format ]; then
  files h hpp c cpp cu cuh | xargs -r "$format" -i
  exit
fi

for check in check_layers check_docs; do
  if python3 tools/$check.py; then
    echo "lint: $check: clean"
  else
    echo "lint: $check: FAILED"
    failed="$failed $check"
  fi
done
run_format
[ "$mode" = no-tidy ] || run_tidy

if [ -n "$failed" ]; then
  echo "lint: FAILED:$failed"
  exit 1
fi
echo "lint: clean"
