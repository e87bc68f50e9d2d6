"""How good a representation is: frozen features under k-NN and linear probes."""
