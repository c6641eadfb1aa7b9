import torch


def arguments(random):
    displacement = torch.zeros(2, 3, 2, 6, 5, dtype=random(1).dtype)
    return random(2, 3, 6, 5).detach(), displacement, torch.tensor([[0, 3, 1], [2, 2, 0]]), 2
