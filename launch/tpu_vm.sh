#!/bin/bash
# Trains on the hosts of a TPU slice (TPU VMs) by gcloud, and starts all of them again when one is lost.
#
# Start:   POD=my-pod ZONE=us-central2-b launch/tpu_vm.sh --config=... --workdir=/shared/runs/phase1
# Change:  POD and ZONE; TYPE and VERSION to create the pod first (CREATE=1); ENTER, how the environment is entered on a
#          host; RESTARTS, how often it is started again.
#
# The command runs on all hosts at the same time and JAX finds the others by itself. gcloud returns the exit code of a
# host that failed. 75, a death by a signal (128 and above) and 255, with which ssh reports a lost host, start the command
# again, which continues from the newest checkpoint. Any other code has to be mended first.
set -u
POD="${POD:?give the name of the pod, e.g. POD=my-pod}"
ZONE="${ZONE:?give the zone of the pod, e.g. ZONE=us-central2-b}"
TYPE="${TYPE:-v5litepod-16}"
VERSION="${VERSION:-v2-alpha-tpuv5-lite}"
ENTER="${ENTER:-source ~/env/bin/activate}"
RESTARTS="${RESTARTS:-100}"
PAUSE="${PAUSE:-30}"

if [ "${CREATE:-0}" = 1 ]; then
    gcloud compute tpus tpu-vm create "$POD" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION" || exit
fi

command="$ENTER && vr-jax train --distributed"
for argument in "$@"; do
    command+=" $(printf '%q' "$argument")"
done

for ((restart = 0; ; restart++)); do
    gcloud compute tpus tpu-vm ssh "$POD" --zone="$ZONE" --worker=all --command="$command"
    code=$?
    if [ "$code" -eq 0 ]; then
        echo "tpu_vm.sh: done ($restart restarts)"
        exit 0
    elif [ "$code" -ne 75 ] && [ "$code" -lt 128 ]; then
        echo "tpu_vm.sh: exit code $code has to be mended first (docs/failures.md)" >&2
        exit "$code"
    elif [ "$restart" -ge "$RESTARTS" ]; then
        echo "tpu_vm.sh: exit code $code; given up after $RESTARTS restarts" >&2
        exit "$code"
    fi
    echo "tpu_vm.sh: exit code $code; the command is started again on all hosts in $PAUSE s" >&2
    sleep "$PAUSE"
done
