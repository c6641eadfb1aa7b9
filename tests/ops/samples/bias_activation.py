def arguments(random):
    return random(2, 3, 6, 5).detach(), random(3).detach(), random(2, 3, 6, 5).detach(), 0.0, 1.5
