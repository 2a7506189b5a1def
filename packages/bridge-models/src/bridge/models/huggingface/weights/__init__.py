"""The vocabulary of weight tables: which tensors of transformers make up each parameter of Megatron-Core, both ways.

Each file holds the weights of one part of a model; a family combines them. Imports nothing outside this folder: no
torch.
"""
