"""The examples run: the tricks on a module that somebody else wrote, and a loop of the user's own."""

import json
import runpy
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load

from lit_ppo.callbacks import AdaptiveKL, CriticWarmup, RewardNormalization
from lit_ppo.generation.config import neutral
from tests.helpers.command import REPOSITORY
from tests.helpers.engines import CopyEngine
from tests.helpers.ppo_command import ppo, write_prompts
from tests.helpers.toys import make_data, make_module, make_trainer

EXAMPLES = REPOSITORY / "examples"
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:", "ignore:.*LeafSpec:")


class Watch(L.Callback):
    """Keeps each update's experience, coefficient and weights."""

    def __init__(self) -> None:
        self.experiences: list[Any] = []
        self.kl_coefs: list[float] = []
        self.actors: list[torch.Tensor] = []

    def on_update_end(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        self.experiences.append(experience)
        self.kl_coefs.append(pl_module.kl_coef)
        self.actors.append(torch.cat([p.detach().flatten().clone() for p in pl_module.actor.parameters()]))


@pytest.fixture(scope="module")
def example() -> Any:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "own_module.py")))


def test_each_trick_does_its_work_there(example: Any):
    """Scores are z-scores, five updates leave the actor alone, and the KL ends where it is told to."""
    plain, tricks = Watch(), Watch()
    example.train([plain], **QUIET)
    example.train([RewardNormalization(clip=5.0), CriticWarmup(5), AdaptiveKL(6.0, 2_000), tricks], **QUIET)
    assert all(float(e.scores.abs().max()) > 100 for e in plain.experiences)
    assert all(float(e.scores.abs().max()) <= 5 for e in tricks.experiences)
    assert [bool((a == b).all()) for a, b in zip(tricks.actors, tricks.actors[1:], strict=False)][:6] == (
        [True] * 4 + [False] * 2
    )
    kls = [[float(e.kl.sum(1).mean()) for e in watch.experiences[-10:]] for watch in (plain, tricks)]
    assert min(kls[0]) > 12  # with a coefficient that is left alone
    assert all(4.5 < kl < 7.5 for kl in kls[1])
    # an error of KL / 6 - 1, clipped to 0.2, times 256 responses in 2,000
    last = kls[1][-1]
    assert tricks.kl_coefs[-1] / tricks.kl_coefs[-2] == pytest.approx(
        1 + max(-0.2, min(0.2, last / 6 - 1)) * 256 / 2_000, rel=1e-6
    )
    start, end = (float(tricks.experiences[i].raw_scores.mean()) for i in (0, -1))
    assert end > start + 200  # of at most 700


def test_it_runs_as_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_TRAINER_LIMIT_TRAIN_BATCHES", "3")
    runpy.run_path(str(EXAMPLES / "own_module.py"), run_name="__main__")
    assert "kl_coef" in capfd.readouterr().out


def test_the_loop_of_its_own(tmp_path: Path, lm: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    scores = runpy.run_path(str(EXAMPLES / "own_loop.py"))["train"](str(lm), updates=2)
    assert len(scores) == 2
    assert min(scores) > 0
    assert (tmp_path / "runs/own_loop/model/model.safetensors").exists()


def test_rewards_of_your_own(tmp_path: Path, lm: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "own_reward.py"))
    assert example["praise"](["a great, great great great film.", "a dull film"]) == [3.0, 0.0]
    assert example["on_topic"](["every scene of it", "every bite"], ["scene", "song"]) == [1.0, 0.0]
    assert example["brief"](["a b c", "a"], budget=2) == [-1.0, 0.0]
    trainer = example["train"](str(lm), epochs=2)
    names = {f"objective/score/{name}" for name in ("praise", "on_topic", "brief")}
    assert {*names, "val/score/distinct"} <= trainer.callback_metrics.keys()
    assert (tmp_path / "runs/own_reward/model/model.safetensors").exists()


def test_a_model_is_used(lm: Path):
    write = runpy.run_path(str(EXAMPLES / "use_model.py"))["write"]
    texts = write(str(lm), ["the film was", "we loved"])
    assert [text.startswith(prompt) for text, prompt in zip(texts, ["the film was", "we loved"], strict=True)] == [
        True
    ] * 2


def test_tricks_of_your_own(tmp_path: Path, lm: Path):
    tricks = runpy.run_path(str(EXAMPLES / "my_tricks.py"))
    short, baseline, watch = tricks["ShortAnswers"](coef=1.0), tricks["MovingBaseline"](decay=0.5), Watch()
    module = make_module(lm, rewards=lambda responses: [float(len(r)) for r in responses])
    make_trainer(tmp_path, max_steps=1, callbacks=[short, watch]).fit(module, make_data(tmp_path))
    (experience,) = watch.experiences
    lengths = experience.response_mask.sum(dim=1)
    torch.testing.assert_close(experience.scores, experience.raw_scores - lengths)
    log = SimpleNamespace(log=lambda name, value: None)
    for mean, expected in ((4.0, 0.0), (8.0, 4.0)):  # the average after the first update is 4, then (4 + 8) / 2
        rows = SimpleNamespace(scores=torch.tensor([mean, mean]))
        baseline.on_scores(None, log, rows)
        assert rows.scores.tolist() == [expected] * 2
    resumed = tricks["MovingBaseline"]()
    resumed.load_state_dict(baseline.state_dict())
    assert resumed.mean == 6.0


def test_a_loop_whose_prompts_the_trainer_draws(tmp_path: Path, lm: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path, 16)
    runpy.run_path(str(EXAMPLES / "own_loop_data.py"))["train"](str(lm), updates=1)
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["step-000001.ckpt"]


def test_learning_from_the_better_half(tmp_path: Path, lm: Path):
    best = runpy.run_path(str(EXAMPLES / "best_half.py"))["BestHalf"]
    watch, scores = Watch(), [3.0, 1.0, 4.0, 2.0]
    module = best(
        str(lm), rewards=lambda responses: scores[: len(responses)], generation={"max_new_tokens": 2}, minibatch_size=2
    )
    make_trainer(tmp_path, max_steps=1, callbacks=[watch]).fit(module, make_data(tmp_path, batch_size=4))
    assert sorted(watch.experiences[0].scores.tolist()) == [3.0, 4.0]


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_a_sweep_with_optuna(tmp_path: Path, lm: Path, monkeypatch: pytest.MonkeyPatch):
    """Two runs, then a third one in the same study; a run without a validation at its end has no result."""
    monkeypatch.chdir(tmp_path)
    sweep = runpy.run_path(str(EXAMPLES / "sweep.py"))["sweep"]
    _, *arguments = ppo(tmp_path, lm)
    validated = [*arguments, "--data.val_fraction=0.5", "--trainer.val_check_interval=1"]
    for trials, stored in ((2, 2), (1, 3)):
        best = sweep(trials, validated, tmp_path / "sweep")
        assert 1 <= len(best) <= stored
        assert len(list((tmp_path / "sweep").glob("trial_*"))) == stored
    assert {"lr", "kl_coef", "lam"} == set(best[0].params)
    scores, kls = zip(*(trial.values for trial in best), strict=True)
    assert (sorted(kls), sorted(scores)) == (list(kls), list(scores))  # each costs more KL than the one before
    with pytest.raises(RuntimeError, match="no validation after the last update"):
        sweep(1, [*arguments, "--data.val_fraction=0.5", "--trainer.check_val_every_n_epoch=9"], tmp_path / "other")


def test_gsm8k_answers():
    """Numbers as the data set writes them; what follows the last #### counts."""
    gsm8k = runpy.run_path(str(EXAMPLES / "gsm8k.py"))
    published = "Half of 2,400 is <<2400/2=1200>>1200.\n#### 1,200"
    row = gsm8k["row"]({"question": "What is half of 2,400?", "answer": published})
    assert row["answer"] == 1200.0
    assert row["prompt"][0]["content"].startswith("What is half of 2,400?\n")
    responses = ["It is 1200. #### 1,200", "#### $1200.00", "#### 12 #### 1200", "1200", "#### twelve", "#### -1200"]
    assert gsm8k["correct"](responses, [1200.0] * 6) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert gsm8k["answered"](responses) == [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]


def test_an_engine_of_your_own(tmp_path: Path, lm: Path):
    """Its server takes weights and samples with them; a lost server is asked again."""
    engine = CopyEngine(str(lm))
    own = dict(engine.model.named_parameters())
    lost = iter([False, False, True])  # two weights arrive, then the server is gone for a moment

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if next(lost, False):
                self.send_error(503)
                return
            answer = {}
            if self.path == "/weights":
                with torch.no_grad():
                    for name, tensor in load(data).items():
                        own[name].copy_(tensor)
            else:
                asked = json.loads(data)
                names = ("max_new_tokens", "temperature")
                config = neutral(**{n: asked[n] for n in names}, eos_token_id=asked["stop_ids"], pad_token_id=0)
                ids, logprobs = engine.generate(asked["prompt_ids"], asked["n"], config, asked["seeds"])
                answer = {"ids": ids, "logprobs": logprobs}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        path = EXAMPLES / "own_engine.py"
        assert len(path.read_text().splitlines()) <= 40
        own_engine = runpy.run_path(str(path))["MyEngine"](f"http://127.0.0.1:{server.server_address[1]}")
        watch = Watch()
        module = make_module(lm, engine=own_engine, samples_per_prompt=2)
        make_trainer(tmp_path, callbacks=[watch]).fit(module, make_data(tmp_path))
        server.shutdown()
    for experience in watch.experiences:
        torch.testing.assert_close(experience.sampling_logprobs, experience.logprobs, rtol=1e-4, atol=1e-4)
