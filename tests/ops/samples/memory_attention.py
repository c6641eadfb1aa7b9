def arguments(random):
    return random(2, 7, 4), random(5, 4), 0.05, 0.5, True
