"""Present figures.

- `tables`: text tables; `plots`: pictures as PNG, and TensorBoard
- `inspection`: what can go of a network, and what stays, with the reason
"""
