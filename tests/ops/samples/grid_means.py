def arguments(random):
    return random(2, 3, 6, 5).detach(), 4
