"""``python -m lit_ppo``: the ``lit-ppo`` command."""

import sys

from lit_ppo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
