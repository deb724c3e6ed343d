"""`python -m cafe` is the command `cafe`."""

import sys

from cafe.cli import main

sys.exit(main())
