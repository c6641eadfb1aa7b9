def arguments(random):
    teacher, student = ([random(2, 3, 6, 5), random(2, 4, 3, 3)] for _ in range(2))
    return teacher, student, "flat", 0.5
