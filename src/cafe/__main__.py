"""`python -m cafe` is the command `cafe`."""

import sys

from cafe.cli.main import main

sys.exit(main())
