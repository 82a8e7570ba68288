"""What is measured on a GPU: benchmarks/gpu.sh runs the parts, each for five minutes at most.

The host may be bare: these modules import torch, timm and the method alone, so that neither MPI nor
heat, propulate or pydantic is needed. ``--dry-run`` runs the same lines on a CPU with tiny sizes.
"""
