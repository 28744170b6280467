"""``python -m rootcellar`` is the command ``rootcellar``, where its folder is not in PATH."""

import sys

from rootcellar.cli import main

sys.exit(main())
