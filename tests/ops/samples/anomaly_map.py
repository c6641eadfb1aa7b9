def arguments(random):
    teacher, student = ([random(2, 3, 6, 5), random(2, 4, 3, 3)] for _ in range(2))
    return teacher, student, [8, 9], "product", 1.0, [1.0, 2.0], [0.5, 1.0], False, 0.2
