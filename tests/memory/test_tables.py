"""The tables of the manual are those of the script."""

from docs.tools.memory import PAGE, counted, traffic, traffic_table


def test_the_smallest_model_in_the_manual_is_counted_as_now() -> None:
    """The other rows come from the same functions and take minutes."""
    peaks = [f"{counted('0.5B', 'LoRA', '32-true', n).peak / 2**30:.0f}" for n in (1, 2, 8, 64)]
    assert f"| 0.5B | LoRA | 32-true | {' | '.join(peaks)} |" in PAGE.read_text(encoding="utf-8")


def test_traffic_is_that_of_the_manual() -> None:
    """7B: 7,615,616,512 weights, of which 7/8 come from the other processes, 2 bytes each."""
    assert traffic_table() in PAGE.read_text(encoding="utf-8")
    moved = traffic("7B", 8, lora=True, minibatches=1, micro_batches=8)
    model = 7_615_616_512 * 2 * 7 / 8 / 1e9
    assert moved["rollout"] == model
    assert moved["scoring"] == model * (1 + 3 * 8)
    assert moved["update: weights"] == model * 2 * 2 * 8
    whole = traffic("7B", 8, lora=False, minibatches=1, micro_batches=8)
    assert whole["update: gradients"] == 7_615_616_512 * 4 * 2 * 7 / 8 / 1e9  # float32, actor and critic
    assert whole["reduced early"] == 8 * whole["update: gradients"]
