"""Cellblock's engine: runs untrusted programs in nsjail and says truthfully what they did.

The parts are imported by their own names, so that the command, which is started once for every
submission, does not load the supervisor.
"""

__version__ = "0.1.0"
