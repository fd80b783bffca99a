"""Machines that run by themselves: `vmette run --detach` and what can be done with them afterwards.

A machine is a directory (:mod:`.machines`). Its supervisor (:mod:`.supervisor`), a process that outlives the command
that started it, holds the directory's lock and the control port, writes the log (:mod:`.log`) and serves a socket, for
clients (:mod:`.client`). There is no daemon: when a supervisor ends, the kernel lets the lock go and ends the VM.
"""
