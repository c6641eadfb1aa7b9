def arguments(random):
    offset, mask = random(2, 18, 6, 5), random(2, 9, 6, 5)
    return random(2, 4, 6, 5), offset, random(6, 4, 3, 3), random(6), [1, 1], [1, 1], [1, 1], mask
