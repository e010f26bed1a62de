"""The parts of tools/benchmark.py. What PyTorch's processes import (pairs, systems, torch_side) imports no JAX."""
