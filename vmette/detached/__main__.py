"""`python -m vmette.detached`: a supervisor."""

import sys

from .supervisor import main

sys.exit(main())
