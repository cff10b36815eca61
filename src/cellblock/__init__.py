"""Cellblock: runs untrusted programs in nsjail, on hosts that reach what is declared and nothing else.

``engine`` runs jobs on a slave, ``job_network`` gives them a network of their own, ``guarded_rules`` keeps
nftables rules in force, ``linux`` speaks to kernel and systemd, ``fleet`` is the controller's: the
declared flows and the proof of them. Parts import each other relatively, as the collection has this
package as one of its module_utils, too. They are imported by their own names, so that the command, which is
started once for every submission, does not load the supervisor.
"""

__version__ = "0.1.0"
