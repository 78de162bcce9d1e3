"""PARO-Bench: fidelity of orders, masks and tails on attention and models that can be made without anyone's weights."""
