import torch


def arguments(random):
    neighbors = torch.tensor([[0, 3, 5], [2, 1, 4], [5, 5, 0], [1, 2, 3]])
    return random(4, 7).detach(), random(6, 7).detach(), neighbors, 0.3
