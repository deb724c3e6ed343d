"""Run the command line as `python -m cafe`, which is what torchrun and accelerate need."""

import sys

from cafe.cli.main import main

sys.exit(main())
