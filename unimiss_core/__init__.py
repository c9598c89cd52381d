"""The mathematics of Federated UniMiSS and the contract between sites and coordinator.

No sockets and no hospital file formats here: torch, numpy, pydantic, safetensors.
"""
