import torch


def arguments(random):
    queries = [random(2, 3, 6, 5).detach(), random(2, 4, 3, 3).detach()]
    supports = [random(4, 3, 6, 5).detach(), random(4, 4, 3, 3).detach()]
    return queries, supports, torch.tensor([[0, 3], [2, 2]]), 1, 2, 0.3
