"""The benchmark for GPUs runs in its small form, where packages are missing that only the command needs."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_ppo.models.actor_critic import Actor
from lit_ppo.models.load import load_causal_lm, load_critic

WITHOUT = """
import importlib.metadata, runpy, sys

MISSING = ("jsonargparse", "datasets", "greenlet")
find = importlib.metadata.Distribution.from_name

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def from_name(name):
    if name in MISSING:
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)

sys.meta_path.insert(0, Missing())
importlib.metadata.Distribution.from_name = from_name
import lit_ppo
for name in lit_ppo.__all__:
    getattr(lit_ppo, name)
from lit_ppo.cli.main import main
assert main(["fit"]) == 1
try:
    lit_ppo.LitPPO("x", generation={"max_new_tokens": 1}).attach(None)
except ImportError as error:
    print(error)
sys.argv = ["gpu", "--small", "--parts", "ppo,generate,sweep,compiled,lora", "--out", sys.argv[1]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def test_it_measures_every_part_without_jsonargparse_datasets_and_greenlet(tmp_path: Path) -> None:
    out, root = tmp_path / "gpu.json", Path(__file__).parent.parent
    command = [sys.executable, "-c", WITHOUT, str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lit-ppo: error: the command: needs jsonargparse; pip install 'jsonargparse[signatures]'" in done.stderr
    assert "LitPPO.attach: needs greenlet; pip install greenlet" in done.stdout
    report = json.loads(out.read_text())
    for part in ("ppo", "lora"):
        assert "error" not in report[part], report[part]
        assert set(report[part]["seconds"]) == {"rollout", "log-probs", "score", "update"}
        assert report[part]["logged"]["response/length"] == 8
        assert report[part]["attention"] == "SDPA"
        assert 0 < report[part]["seconds"]["update"] < 10 * report[part]["logged"]["time/update"]
    assert set(report["generate"]) == {"bandwidth_bound", "stock", "dynamic", "static", "static_without_graphs"}
    for found in [*report["generate"].values(), report["compiled"]["compiled"]]:
        assert found is None or found["tokens_per_second"] > 0, found  # the CPU's bandwidth is unknown
    assert [row["chunk"] for row in report["sweep"]] == ["2^23", "2^25", "2^27"] * 3


def test_what_would_last_too_long_is_left_out_and_ended() -> None:
    from benchmarks.gpu import measured

    def forever() -> None:
        while True:
            with suppress(Exception):
                time.sleep(10)

    assert measured("lora", dict, needs=90, left=80) == {"skipped": "lora needs about 90 s, 80 s are left"}
    assert measured("ppo", forever, needs=0.1, left=0.2) == {"skipped": "ended after 0 s: no time left"}
    failed = measured("sweep", lambda: 1 // 0, needs=0, left=9)
    assert failed["error"] == "ZeroDivisionError: integer division or modulo by zero"
    assert "lambda: 1 // 0" in failed["traceback"]


def test_flops_by_hand() -> None:
    """One prompt of 2 + 1 tokens, hidden 4, one layer, 2 heads, 1 for keys, feed-forward 3, vocabulary 5.

    Attention weights 4 * 2 * (4 + 2) = 48, feed-forward 3 * 4 * 3 = 36: 84 * 2 * 3 tokens = 504. Pairs 6 * 4 * 4 = 96.
    Two models 1,200; head 2 * 4 * 6 * 1 = 48; with backward three times: 3,744.
    """
    from benchmarks.gpu import Job, update_flops

    job = Job(4, 1, 2, 1, 3, vocabulary=5, prompts=1, prompt=2, response=1)
    assert update_flops(job) == 3744


def test_bandwidth_bound_by_hand() -> None:
    """Weights of 10 numbers and 2 heads for keys of 2 numbers, in bf16, 4 rows of 3 prompt and 2 response tokens.

    Weights 20 bytes. Keys and values 2 * 1 layer * 2 * 2 * 2 bytes = 16 a token; 4 rows of 3 + 2 / 2 tokens: 256.
    At 2,760 bytes a second ten times all of this, each time 4 tokens: 40.
    """
    from benchmarks.decode import bandwidth_bound
    from benchmarks.gpu import Job

    model = torch.nn.Linear(10, 1, bias=False)
    job = Job(8, 1, 4, 2, 3, prompts=4, prompt=3, response=2)
    assert bandwidth_bound(job, model, 2760) == 40


def test_flops_are_those_that_torch_counts(tmp_path: Path) -> None:
    """All matrix products of linear layers and heads, forward and backward; attention is counted by causal pairs."""
    from benchmarks.gpu import JOBS, make_models, update_flops

    job = JOBS["small"]
    make_models(job, tmp_path)
    path = str(tmp_path / "actor")
    actor, critic = Actor(load_causal_lm("actor", path, {})), load_critic("critic", path, {})
    length = job.prompt + job.response
    ids, mask = torch.arange(job.prompts * length).view(-1, length) % 300, torch.ones(job.prompts, length).bool()
    with FlopCounterMode(display=False) as counter:
        actor(ids, mask, target_mask=mask[:, -job.response :])[0].sum().backward()
        critic(ids, mask, target_mask=mask[:, -job.response :]).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    pairs = 3 * 2 * job.prompts * 4 * job.layers * job.hidden * length * (length + 1) // 2
    assert counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0) == update_flops(job) - pairs
