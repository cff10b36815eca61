"""The engine of a slave: takes jobs over a socket, runs each in a jail, says truthfully what it did."""
