#!/bin/bash
# Trains in several processes on this machine, which is how to try a pod without one.
#
# Start:   launch/local.sh --config=configs/demo.py --workdir=runs/four
# Change:  PROCESSES, and RESTARTS, the number of restarts without progress after which it gives up.
#
# The processes share the CPU. When one is lost, the others name it and end, and all are started again from the newest
# checkpoint. Ctrl-C saves and ends; the same command continues.
set -eu
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec vr-jax launch --processes="${PROCESSES:-4}" --restarts="${RESTARTS:-3}" -- train "$@"
