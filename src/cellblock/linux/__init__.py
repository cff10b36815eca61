"""Thin clients of what a Linux host offers: netlink, nftables, systemd's journal and notifications."""
