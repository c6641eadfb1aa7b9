def arguments(random):
    return random(2, 3, 6, 5).detach(), random(3).detach(), random(3).detach().abs() + 1, 3, 1.0
