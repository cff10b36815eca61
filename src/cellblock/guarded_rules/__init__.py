"""Guarded rules: an nftables table of our own that is changed without locking anybody out, survives
reboots, and is put back whenever somebody else changes it.

`table` reads, checks and loads rules, `compare` says how the kernel's table differs, `trial` loads new
rules until they are confirmed or rolled back, `watch` is the guard, `command` what people and units
call. `instance` says which table it is about: the host's firewall and the guard around jobs' networks
are two of them. On a host all of this is one file; `installation`, the controller's half, makes it.

Runs on the hosts' own Python (3.10 or newer), standard library only; needs nft, unshare and systemd.
"""
