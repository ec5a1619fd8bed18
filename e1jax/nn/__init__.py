"""The model: layers, attention and the key/value cache, and the kernels below them.

`model.forward` and `model.unembed` are what others call.
"""
