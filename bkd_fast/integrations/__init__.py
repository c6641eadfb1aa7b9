"""BKD inside other programs: each module here needs the package it is named after."""
