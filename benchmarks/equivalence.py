"""One update on one process against the same update on several ranks: ``python -m benchmarks.equivalence``.

Prints the largest relative difference of any parameter's gradient and of any parameter's change.
"""

import tempfile
import warnings
from pathlib import Path

from tests.helpers.equivalence import Case, compare

OPTIONS = ("activation_checkpointing", "compiled", "features", "lora")


def described(case: Case) -> str:
    """A row's label."""
    model = f"{case.family}{'' if case.tied else ', untied'}"
    extra = [name for name in OPTIONS if getattr(case, name)]
    return ", ".join([f"{case.strategy:5} {model}, micro-batches of {case.micro_batch_size}", *extra])


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for (n, case), found in compare(Path(folder)).items():
            numbers = [f"{name} {found[name]:.1e}" for name in ("gradients", "changes", "beyond_rounding")]
            print(f"{n} ranks, {described(case)}: {', '.join(numbers)}", flush=True)


if __name__ == "__main__":
    main()
