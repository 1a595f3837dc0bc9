#!/bin/sh
# SPDX-License-Identifier: MIT
# Eight ranks, or four where the machine has four GPUs; on fewer GPUs eight ranks share them.
ranks=8
[ "$(nvidia-smi --list-gpus | wc -l)" -ne 4 ] || ranks=4
exec "$(dirname "$0")/gpus.sh" "$ranks" "$@"
