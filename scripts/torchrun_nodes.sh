#!/usr/bin/env bash
# rasa-train on several machines without a scheduler. Run on every machine, with its own node rank:
#
#   NODES=8 NODE_RANK=0 HEAD=10.0.0.1:29500 scripts/torchrun_nodes.sh RECIPE [section.key=value ...]   # on 10.0.0.1
#   NODES=8 NODE_RANK=1 HEAD=10.0.0.1:29500 scripts/torchrun_nodes.sh RECIPE [section.key=value ...]   # on the next
#
# The machines prove to each other that they belong together by a secret. Make it once, where all of them can read it:
#   (umask 077; openssl rand -hex 32 > ~/rasa-train-secret); export RASA_TRAIN_SECRET_FILE=~/rasa-train-secret
#
# `rasa-train --nnodes` is torchrun's elastic agent with that secret, recipe and data checked first, one message for an
# error, and exit code 75 after a stop (torchrun's own is 1). LAUNCHER=torchrun starts the same workers with torchrun
# itself, whose port is open to everyone on the network (see docs/DISTRIBUTED.md). Its rendezvous is the static one:
# c10d, the other one, would run programs that a stranger stores there.
#
# 8 x A100-40G hold a 7-8B base on every GPU (ddp). 70B and Mixtral need it divided (distributed.strategy=zero3): see
# the arithmetic in slurm.sbatch, and `rasa-train check RECIPE --nproc 8 --nnodes 8 distributed.gpu_memory_gib=40`.
set -euo pipefail
: "${NODES:?number of machines}" "${NODE_RANK:?rank of this machine, from 0}" "${HEAD:?HOST:PORT of machine 0}"
GPUS=${GPUS:-auto}

if [ "${LAUNCHER:-rasa-train}" = torchrun ]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
  if [ "$GPUS" = auto ]; then GPUS=gpu; fi
  exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --node-rank "$NODE_RANK" --rdzv-backend static \
    --master-addr "${HEAD%:*}" --master-port "${HEAD##*:}" --max-restarts 2 \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 -m rasa_train.cli.train "$@"
fi
exec rasa-train "$@" --nproc "$GPUS" --nnodes "$NODES" --node-rank "$NODE_RANK" --rdzv "$HEAD" --max-restarts 2
