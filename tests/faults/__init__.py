"""A seeded harness of faults: random recipes, rows, files, rewards and deaths, and what each run made of them."""
