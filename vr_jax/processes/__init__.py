"""The processes of a run as those of an operating system: who lives, who is lost, and who starts them (leaf modules).

`liveness` tells each process which others live. `watch` ends a process when another one is lost, and `native_messages`
holds back what native code would print of it. `supervisor` starts the processes of a command on this machine and starts
them again. Nothing here uses JAX; what the processes of a run exchange through JAX is `vr_jax.distributed`.
"""
