"""``python -m cipm_ir``: the command line, where ``cipm`` is not on the path."""

from __future__ import annotations

import sys

from cipm_ir.cli import main

sys.exit(main())
