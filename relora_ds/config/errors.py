"""The error that lists everything wrong with a recipe."""


class RecipeError(ValueError):
    """A recipe that cannot run. `problems` lists everything that is wrong with it; `str` shows one per line."""

    def __init__(self, problems: list[str], source: str | None = None):
        self.problems = list(problems)
        where = f" in recipe {source}" if source else ""
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{count}{where}:", *(f"  {problem}" for problem in self.problems)]))
