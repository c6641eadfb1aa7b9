def arguments(random):
    return random(4, 37).detach(), 5
