def arguments(random):
    levels = [random(2, 3, 6, 5).detach(), random(2, 4, 3, 3).detach(), random(2, 5, 2, 1).detach()]
    return levels, [0.5, 1.0, 2.0], [3, 3]
