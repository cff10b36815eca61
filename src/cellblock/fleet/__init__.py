"""The controller's half of Cellblock: which host may reach which, and the proof of it.

``model`` reads the declared flows, and ``rules`` derives a host's firewall rules from them. The proof:
``probe_plan`` says what to try from where, ``completion`` adds what only the hosts know, ``answers``
takes from what they answered only what fits, ``verdict`` compares it with what is declared, and
``report`` shows the outcome. Nothing here is installed on a host.
"""
