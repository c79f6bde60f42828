#!/bin/bash
#SBATCH --job-name=daikon
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# Training under Slurm, as long as it takes: five minutes before its time is over the job saves,
# queues itself again and goes on. From the root of a checkout that all nodes see:
#
#     sbatch --nodes 8 examples/slurm.sh pipeline.train_dalle --preset dalle_12b --data tokens \
#         --tokenizer tokenizer --out runs/12b --deepspeed_config ds_configs/zero3_12b.json

set -u
cd "${SLURM_SUBMIT_DIR:?this is for sbatch}" || exit
PATH=$PWD/.venv/bin:$PATH
readonly SAVED=75 # pipeline.training.watching.watch.LEFT: start it again and it goes on

hosts=$PWD/hosts.$SLURM_JOB_ID
names=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit
sed "s/$/ slots=${SLURM_GPUS_ON_NODE:-1}/" <<< "$names" > "$hosts" || exit
trap 'rm -f "$hosts"' EXIT

export hosts
export master_addr=${names%%$'\n'*}
export master_port=$((10000 + SLURM_JOB_ID % 20000)) # jobs may share a machine

# One launcher a node. Slurm signals this shell, and on some clusters all below it. What asks to
# save goes to the whole process group of the launcher: its two halves ignore it, the ranks
# save. SIGTERM to a launcher would leave its ranks behind.
# shellcheck disable=SC2016
node='
    set -m
    (
        trap "" USR1
        exec deepspeed --hostfile "$hosts" --no_ssh --node_rank "$SLURM_NODEID" \
            --master_addr "$master_addr" --master_port "$master_port" --module "$@"
    ) &
    launcher=$!
    set +m # or bash tells of the job that is done
    trap "kill -USR1 -- -$launcher 2> /dev/null" USR1 TERM
    while kill -0 "$launcher" 2> /dev/null; do wait "$launcher"; done
    wait "$launcher"
'
# A node whose peers are gone ends by itself; --wait is for one that does not. The default of some
# clusters, --kill-on-bad-exit, would end nodes that are about to leave with the same code.
srun --kill-on-bad-exit=0 --wait=120 --cpu-bind=none bash -c "$node" node "$@" &
step=$!

# again and again: ranks that are only starting do not listen yet
leave() { while kill -USR1 "$step" 2> /dev/null; do sleep 5; done & }
cancelled=
trap leave USR1
trap 'cancelled=yes; leave' TERM

while kill -0 "$step" 2> /dev/null; do wait "$step"; done
wait "$step"
code=$?
if [[ $code == "$SAVED" && ! $cancelled ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
