"""How CPU threads wait for each other; read by OpenMP when torch loads, so set before that."""

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
"""Environment variables: threads that wait look for work for some 30 µs, then sleep.

Threads that spin as long as is usual take the core from the very thread they wait for when anything else runs on the
machine: small steps then take several times as long. Threads that sleep at once must be woken between any two steps.
The second variable is that of GNU's OpenMP, which PyTorch brings for Linux; the first holds elsewhere.
"""
