#!/bin/sh
# SPDX-License-Identifier: MIT
# Two ranks: on two GPUs over NVLink, or sharing one.
exec "$(dirname "$0")/gpus.sh" 2 "$@"
