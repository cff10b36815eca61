"""The controller's half of Cellblock: which host may reach which, and the proof of it.

``model`` reads the declared flows, ``rules`` derives a host's firewall rules from them, ``matrix``
the connections that a probe of the live fleet must and must not make, ``report`` shows the outcome.
Nothing here is installed on a host.
"""
