"""Making a trained model smaller: fewer layers, eight bits a weight, and a teacher to heal it.

- `pruning`: removes the language layers that change the hidden states least
- `quantisation`: keeps matrices as int8 with one scale for each output channel
- `distillation`: trains a model on the answers and on the probabilities of a larger one
- `comparison`: a model before and after, side by side
"""
