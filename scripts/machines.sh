#!/usr/bin/env bash
# One video on several machines: run on each of them, with the same arguments but for RANK (0, 1, ...).
#
#   scripts/machines.sh RANK MACHINES HOST:PORT PROCESSES [arguments of longvid generate]
#
# HOST:PORT is a free port of machine 0, which gets the files. A run that is to be resumed on other machines needs its
# --run-dir on a folder that all of them share.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install "" run

rank="${1:?rank of this machine, from 0}" machines="${2:?number of machines}"
endpoint="${3:?HOST:PORT of machine 0}" processes="${4:?processes on each machine}"
shift 4
exec "$bin/longvid" generate --node-rank "$rank" --nnodes "$machines" --rdzv-endpoint "$endpoint" --nproc "$processes" "$@"
