#!/bin/sh
# SPDX-License-Identifier: MIT
# From a bare Debian or Ubuntu machine to a make target: installs the packages that are missing, then calls make.
set -eu
cd "$(dirname "$0")"

usage() {
  cat <<'END'
usage: ./do [TARGET] [VARIABLE=value ...]

Installs what TARGET needs (Debian and Ubuntu; sudo where not root), then runs `make TARGET VARIABLE=value ...`.

  ./do demo     eight ranks run an MoE layer over real text
  ./do test     all tests, with sanitizers, and lint
  ./do bench    measure, beside memcpy, Open MPI and, from Python, gloo
  ./do framework-test  frameworks' own code on this library, each installed from PyPI
  ./do cluster-test  ranks across network namespaces of this machine, with cut links and killed ranks (as root)
  ./do cluster-bench  measure between nodes, beside iperf3 and Open MPI (as root)
  ./do build    the library and its programs (also without a TARGET)
  ./do help     all targets
END
}

# a|b: the first of the two that this release has.
build_packages="build-essential cmake ninja-build python3 libfmt-dev libgtest-dev libgmock-dev nlohmann-json3-dev libcli11-dev libfabric-dev"
demo_packages="build-essential cmake ninja-build libfmt-dev nlohmann-json3-dev libcli11-dev"
bench_packages="$build_packages libbenchmark-dev openmpi-bin libopenmpi-dev"
lint_packages="clang-format-14|clang-format clang-tidy-14|clang-tidy"
python_packages="python3-dev python3-venv python3-pip" # the rest comes from PyPI into build/python

packages_for() {
  case $1 in
    demo) echo "$demo_packages" ;;
    bench) echo "$bench_packages $python_packages" ;;
    framework-test) echo "$build_packages $python_packages" ;;
    cluster-test) echo "$build_packages iproute2" ;;
    cluster-bench) echo "$bench_packages iproute2 iperf3" ;;
    test) echo "$bench_packages $lint_packages $python_packages" ;;
    lint) echo "$build_packages $lint_packages" ;;
    format) echo "make $lint_packages" ;;
    clean | help) echo "make" ;;
    *) echo "$build_packages" ;;
  esac
}

installed() {
  dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q "ok installed"
}

# Prints the packages that are missing; the first name of a|b unless another one is already there.
missing() {
  for choice in "$@"; do
    found=""
    for package in $(echo "$choice" | tr '|' ' '); do
      if installed "$package"; then found=yes; fi
    done
    [ -n "$found" ] || echo "$choice"
  done
}

# Prints the first name of each a|b that apt knows. What this release does not have is left out: the build does without most
# packages, and says which one it needs.
available() {
  for choice in "$@"; do
    found=""
    for package in $(echo "$choice" | tr '|' ' '); do
      if [ -z "$found" ] && [ -n "$(apt-cache madison "$package" 2>/dev/null)" ]; then found=$package; fi
    done
    if [ -n "$found" ]; then echo "$found"; else echo "do: apt knows no $choice, going on without it" >&2; fi
  done
}

as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    echo "do: not root, and there is no sudo; run as root: $*" >&2
    return 1
  fi
}

install_packages() {
  if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    echo "do: this is not Debian or Ubuntu, so nothing is installed; needed are what Debian calls: $*" >&2
    return
  fi
  # shellcheck disable=SC2046  # words are wanted
  set -- $(missing "$@")
  [ $# -gt 0 ] || return 0
  echo "do: installing $*" >&2
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -q update || echo "do: apt-get update failed, trying what it knows" >&2
  # shellcheck disable=SC2046
  set -- $(available "$@")
  [ $# -gt 0 ] || return 0
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@"
}

case ${1:-} in
  -h | --help) usage; exit 0 ;;
esac
target=build
for argument in "$@"; do
  case $argument in
    *=* | -*) ;;
    *) target=$argument; break ;;
  esac
done

# shellcheck disable=SC2046
install_packages $(packages_for "$target")
command -v make >/dev/null || { echo "do: there is no make" >&2; exit 1; }

if [ "$target" != test ]; then
  exec make "$@"
fi
# make ends a failed target with a line of its own; repeat the summary, so that it is the last one here as well.
summary=out/test/summary.txt
rm -f "$summary"
status=0
make "$@" || status=$?
if [ "$status" -ne 0 ] && [ -f "$summary" ]; then cat "$summary"; fi
exit "$status"
