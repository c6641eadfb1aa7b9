def arguments(random):
    return random(1, 36, 6, 5), random(2, 18, 6, 5), None, [3, 3], [1, 1], [1, 1], [1, 1]
