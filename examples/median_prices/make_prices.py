"""Writes prices.csv: sales of flats in an invented town, the same ones on every run."""

import csv
import random
from pathlib import Path

SALES = 400
PRICE_PER_M2 = {"north": 3100, "south": 4200, "east": 2700, "west": 3600}


def main() -> None:
    generator = random.Random(7)
    with (Path(__file__).parent / "prices.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["side", "rooms", "area_m2", "year", "price"])
        for _ in range(SALES):
            side = generator.choice(list(PRICE_PER_M2))
            rooms = generator.randint(1, 5)
            area = 12 + rooms * generator.randint(17, 26)
            year = generator.randint(1900, 2024)
            condition = generator.uniform(0.75, 1.25)
            price = round(area * PRICE_PER_M2[side] * condition, -3)
            table.writerow([side, rooms, area, year, int(price)])


if __name__ == "__main__":
    main()
