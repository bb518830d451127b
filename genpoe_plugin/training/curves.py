import csv

from genpoe_plugin.files import atomic_file


def write_curves(directory, losses, validations):
    with atomic_file(directory / "loss.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss", "learning_rate"), *losses])
