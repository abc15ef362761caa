#!/usr/bin/env bash
# rasa-train with the DeepSpeed launcher: it logs in to each machine of a hostfile by ssh and starts the workers.
#
#   scripts/deepspeed_hostfile.sh HOSTFILE RECIPE [section.key=value ...]
#
# HOSTFILE has a line for each machine:   worker-1 slots=8
# The package, the recipe and output_dir must be at the same path on all of them. Any strategy may be chosen, not only
# ZeRO: the launcher only starts processes. For 70B and Mixtral on 8 machines of 8 x A100-40G take
# distributed.strategy=zero3 (arithmetic in slurm.sbatch; your own numbers with `rasa-train check RECIPE`).
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 HOSTFILE RECIPE [section.key=value ...]" >&2
  exit 2
fi
hostfile=$1
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
exec deepspeed --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" --no_local_rank --module rasa_train.cli.train "$@"
