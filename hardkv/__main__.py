"""`python -m hardkv`."""

import sys

from hardkv.cli import main

sys.exit(main())
