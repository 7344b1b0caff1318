"""How much PPO learns for the drift that it causes: the frontier of score against KL on the film-review task.

In this order, from the repository's root; ``FOLDER`` holds checkpoints and samples, outside of git::

    python -m benchmarks.learning.checkpoints FOLDER --data_root DIR   # SFT, reward model, judge, critic
    python -m benchmarks.learning.limit FOLDER --data_root DIR         # what any policy could gain
    python -m benchmarks.learning.reading FOLDER --data_root DIR       # what the score depends on
    python -m benchmarks.learning.run FOLDER --data_root DIR --name lam05 --seeds 0 1 2 --model.advantages.lam 0.5
    python -m benchmarks.learning.trl FOLDER --data_root DIR --python PYTHON --name trl   # TRL in our place
    python -m benchmarks.learning.report benchmarks/results/learning
    python -m benchmarks.learning.ablation FOLDER --data_root DIR      # each trick alone, PPO-max less each
    python -m benchmarks.learning.stability FOLDER --data_root DIR     # settings that collapse, and what saves them
    python -m benchmarks.learning.gold FOLDER --data_root DIR          # over-optimisation, by the judge
    python -m benchmarks.learning.token_advantages FOLDER --data_root DIR --actor MODEL --name NAME

A task whose reward is a rule, and which needs no data: ``python -m benchmarks.learning.arithmetic FOLDER``.

``DIR`` holds the files that ``configs/sentiment.yaml`` names.
"""
