"""The jobs' network: which addresses slots have, what a policy reaches, and the slots themselves."""
