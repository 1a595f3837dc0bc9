#!/bin/sh
# SPDX-License-Identifier: MIT
# Eight ranks, or four where the machine has four GPUs; on fewer GPUs eight ranks share them.
exec "$(dirname "$0")/gpus.sh" 8 --or 4 "$@"
